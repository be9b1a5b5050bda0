#include "snap/vmm/ptrace_call.h"

#include <elf.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#include <cerrno>
#include <charconv>
#include <string>

namespace vmsnap {

namespace {

constexpr uint64_t user_code_segment = 0x33;  // 64-bit code on x86-64 Linux
constexpr int wait_limit_us = 5'000'000;

// System calls that return EINTR when a thread is stopped and let go again,
// even though no handler ran (signal(7), "Interruption of system calls and
// library functions by stop signals"). Others the kernel restarts itself.
bool returns_eintr_after_stop(uint64_t number) {
  switch (number) {
    case SYS_epoll_wait:
    case SYS_epoll_pwait:
    case SYS_epoll_pwait2:
    case SYS_semop:
    case SYS_semtimedop:
    case SYS_rt_sigtimedwait:
    case SYS_io_getevents:
    case SYS_msgrcv:
    case SYS_msgsnd: return true;
    default: return false;
  }
}

// Whether a signal that the thread would take is waiting: then EINTR is true.
bool has_pending_signal(const Process& process, pid_t tid) {
  const auto status = read_small_file(fmt::format("/proc/{}/task/{}/status", process.pid(), tid));
  if (!status) return true;
  const auto mask = [&](const char* name) {
    const size_t at = status->find(name);
    uint64_t value = ~uint64_t{0};
    if (at != std::string::npos) {
      const char* start = status->c_str() + at + std::char_traits<char>::length(name);
      while (*start == '\t' || *start == ' ') ++start;
      std::from_chars(start, start + 16, value, 16);
    }
    return value;
  };
  return ((mask("SigPnd:") | mask("ShdPnd:")) & ~mask("SigBlk:")) != 0;
}

}  // namespace

long trace(int request, pid_t tid, uint64_t address, const void* data) {
  return ::ptrace(static_cast<__ptrace_request>(request), tid, reinterpret_cast<void*>(address),
                  const_cast<void*>(data));
}

long trace(int request, pid_t tid, uint64_t address, uint64_t data) {
  return trace(request, tid, address, reinterpret_cast<const void*>(data));
}

tl::unexpected<Error> trace_error(const Process& process, const char* what, int os_errno) {
  return tl::unexpected(Error::from_errno(
      os_errno, fmt::format("{} of {} failed", what, process.describe()), ErrorCode::vm));
}

Result<bool> seize_thread(const Process& process, pid_t tid) {
  if (trace(PTRACE_SEIZE, tid, 0, uint64_t{0}) == 0) return true;
  const int why = errno;
  if (why == ESRCH) return false;
  const auto tracer = process.status_field("TracerPid");
  if (why == EPERM && tracer && *tracer != "0" && !tracer->empty()) {
    return tl::unexpected(Error(ErrorCode::refused, fmt::format("{} is being traced by process {}",
                                                                process.describe(), *tracer))
                              .with_remedy("Detach that debugger or tracer, then try again."));
  }
  // A thread that is ending cannot be traced, and says EPERM as well.
  const auto status =
      read_small_file(fmt::format("/proc/{}/task/{}/status", process.pid(), tid));
  if (!status || status->find("\nState:\tZ") != std::string::npos ||
      status->find("\nState:\tX") != std::string::npos) {
    return false;
  }
  return tl::unexpected(
      Error::from_errno(why, "cannot trace " + process.describe(), ErrorCode::privilege)
          .with_remedy("Tracing needs CAP_SYS_PTRACE: run vmsnap as root."));
}

// A thread in uninterruptible sleep must not hold us for ever, hence no
// blocking wait.
Result<int> wait_for_stop(const Process& process, pid_t tid) {
  for (int waited_us = 0; waited_us < wait_limit_us;) {
    int status = 0;
    const pid_t changed = ::waitpid(tid, &status, __WALL | WNOHANG);
    if (changed == tid) return status;
    if (changed < 0 && errno != EINTR) return trace_error(process, "waiting for a thread", errno);
    const int nap_us = waited_us < 2000 ? 20 : 1000;
    const timespec nap = {0, nap_us * 1000};
    ::nanosleep(&nap, nullptr);
    waited_us += nap_us;
  }
  return tl::unexpected(Error(ErrorCode::vm, fmt::format("a thread of {} does not stop", process.describe()))
                            .with_remedy("It may wait for a disk; try again later."));
}

Status interrupt_start(const Process& process, pid_t tid) {
  if (trace(PTRACE_INTERRUPT, tid, 0, uint64_t{0}) == 0 || errno == ESRCH) return {};
  return trace_error(process, "PTRACE_INTERRUPT", errno);
}

Result<bool> interrupt_finish(const Process& process, pid_t tid) {
  for (;;) {
    const int status = VMSNAP_TRY(wait_for_stop(process, tid));
    if (!WIFSTOPPED(status)) return false;
    if (status >> 16 == PTRACE_EVENT_STOP) return true;
    if (trace(PTRACE_CONT, tid, 0, static_cast<uint64_t>(WSTOPSIG(status))) < 0 && errno != ESRCH) {
      return trace_error(process, "PTRACE_CONT", errno);
    }
  }
}

Result<user_regs_struct> get_registers(const Process& process, pid_t tid) {
  user_regs_struct registers = {};
  iovec place = {&registers, sizeof registers};
  if (trace(PTRACE_GETREGSET, tid, NT_PRSTATUS, &place) < 0) {
    return trace_error(process, "PTRACE_GETREGSET", errno);
  }
  if (place.iov_len != sizeof registers || registers.cs != user_code_segment) {
    return fail(ErrorCode::unsupported, "{} is not a 64-bit x86 process", process.describe());
  }
  return registers;
}

Status set_registers(const Process& process, pid_t tid, const user_regs_struct& registers) {
  user_regs_struct copy = registers;
  iovec place = {&copy, sizeof copy};
  if (trace(PTRACE_SETREGSET, tid, NT_PRSTATUS, &place) < 0) {
    return trace_error(process, "PTRACE_SETREGSET", errno);
  }
  return {};
}

bool repeat_call_cut_short(const Process& process, pid_t tid, user_regs_struct& registers) {
  if (!in_system_call(registers) || static_cast<int64_t>(registers.rax) != -EINTR) return false;
  if (!returns_eintr_after_stop(registers.orig_rax) || has_pending_signal(process, tid)) return false;
  registers.rax = registers.orig_rax;
  registers.rip -= 2;  // the length of a syscall instruction
  return true;
}

}  // namespace vmsnap
