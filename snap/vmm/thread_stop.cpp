#include "snap/vmm/thread_stop.h"

#include <sys/ptrace.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <set>

#include "snap/vmm/ptrace_call.h"

namespace vmsnap {

namespace {

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

// A thread whose waiting call our stop cut short shall not notice: it makes
// the call again. Its time limit, if it had one, starts anew.
void repeat_interrupted_call(const Process& process, pid_t tid) {
  auto registers = get_registers(process, tid);
  if (!registers || !in_system_call(*registers)) return;
  if (static_cast<int64_t>(registers->rax) != -EINTR) return;
  if (!returns_eintr_after_stop(registers->orig_rax) || has_pending_signal(process, tid)) return;
  registers->rax = registers->orig_rax;
  registers->rip -= 2;  // the length of a syscall instruction
  (void)set_registers(process, tid, *registers);
}

}  // namespace

Result<ThreadStop> ThreadStop::stop(const Process& process) {
  ThreadStop stopped(process);
  std::set<pid_t> known;
  // Threads start threads until all stand still: look again until none is new.
  for (bool found_new = true; found_new;) {
    found_new = false;
    std::vector<pid_t> fresh;
    for (const pid_t tid : VMSNAP_TRY(process.threads())) {
      if (!known.insert(tid).second) continue;
      if (!VMSNAP_TRY(seize_thread(process, tid))) continue;
      stopped.tids_.push_back(tid);
      fresh.push_back(tid);
      VMSNAP_CHECK(interrupt_start(process, tid));
    }
    for (const pid_t tid : fresh) {
      found_new = true;
      if (!VMSNAP_TRY(interrupt_finish(process, tid))) std::erase(stopped.tids_, tid);
    }
  }
  if (stopped.tids_.empty()) return fail(ErrorCode::vm, "{} has ended", process.describe());
  return stopped;
}

void ThreadStop::resume() {
  for (const pid_t tid : tids_) {
    repeat_interrupted_call(*process_, tid);
    trace(PTRACE_DETACH, tid, 0, uint64_t{0});
  }
  tids_.clear();
}

}  // namespace vmsnap
