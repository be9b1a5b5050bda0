#include "snap/vmm/remote_thread.h"

#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "snap/vmm/memory_map.h"
#include "snap/vmm/ptrace_call.h"

namespace vmsnap {

namespace {

constexpr uint64_t red_zone = 128;  // below the stack pointer, System V ABI

// Whether the thread may be inside a restartable sequence. A detour makes the
// kernel forget the sequence, and the thread would then finish it unsafely.
bool may_be_in_rseq(const Process& process, pid_t tid) {
  struct {
    uint64_t area;
    uint32_t size, signature, flags, padding;
  } configuration = {};
  constexpr int get_rseq_configuration = 0x420f;  // PTRACE_GET_RSEQ_CONFIGURATION, Linux 5.13
  if (trace(get_rseq_configuration, tid, sizeof configuration, &configuration) < 0) {
    return errno != EIO;  // EIO: a kernel that does not know; before 5.13 glibc 2.35 is rare
  }
  if (configuration.area == 0) return false;
  uint64_t sequence = 0;  // rseq_cs, after two 32-bit fields
  const Status got = process.read(RemotePtr(configuration.area + 8),
                                  std::as_writable_bytes(std::span(&sequence, 1)));
  return !got || sequence != 0;
}

// A syscall instruction (0f 05) in the vDSO, which every process has mapped.
Result<RemotePtr> find_syscall_instruction(const Process& process) {
  for (const Mapping& mapping : VMSNAP_TRY(read_memory_map_quick(process))) {
    if (mapping.path != "[vdso]") continue;
    std::vector<std::byte> code(std::min<uint64_t>(mapping.range.length, 1 << 20));
    VMSNAP_CHECK(process.read(mapping.range.start, code));
    const std::byte instruction[] = {std::byte{0x0f}, std::byte{0x05}};
    const auto at = std::search(code.begin(), code.end(), std::begin(instruction), std::end(instruction));
    if (at != code.end()) return mapping.range.start + static_cast<uint64_t>(at - code.begin());
  }
  return fail(ErrorCode::unsupported, "{} has no vDSO with a system call in it", process.describe());
}

}  // namespace

Result<RemoteThread> RemoteThread::seize(const Process& process) {
  // Twice over all threads for one that waits in a system call; the last time,
  // any that is safe will do.
  for (int round = 0; round < 3; ++round) {
    std::vector<pid_t> tids = VMSNAP_TRY(process.threads());
    std::sort(tids.begin(), tids.end());  // the main thread has the lowest number, mostly
    for (const pid_t tid : tids) {
      if (!VMSNAP_TRY(seize_thread(process, tid))) continue;
      RemoteThread thread(process, tid);
      VMSNAP_CHECK(interrupt_start(process, tid));
      if (!VMSNAP_TRY(interrupt_finish(process, tid))) continue;
      thread.saved_ = VMSNAP_TRY(get_registers(process, tid));
      const bool good = in_system_call(thread.saved_) ||
                        (round == 2 && !may_be_in_rseq(process, tid));
      if (good) {
        VMSNAP_CHECK(thread.prepare());
        return thread;
      }
    }
  }
  return fail(ErrorCode::vm, "no thread of {} can be borrowed for a moment; try again",
              process.describe());
}

Status RemoteThread::prepare() {
  syscall_instruction_ = VMSNAP_TRY(find_syscall_instruction(*process_));
  // A seccomp filter that does not know our call would kill the VM. The kernel
  // suspends it only for who has CAP_SYS_ADMIN and no filter of its own.
  filtered_ = trace(PTRACE_SETOPTIONS, tid_, 0, uint64_t{PTRACE_O_SUSPEND_SECCOMP}) < 0 &&
              VMSNAP_TRY(process_->thread_status_field(tid_, "Seccomp")) != "0";
  // Signals wait until we are done, but for SIGTRAP, which ends our step.
  if (trace(PTRACE_GETSIGMASK, tid_, sizeof saved_mask_, &saved_mask_) < 0) {
    return trace_error(*process_, "PTRACE_GETSIGMASK", errno);
  }
  uint64_t mask = ~(uint64_t{1} << (SIGTRAP - 1));
  if (trace(PTRACE_SETSIGMASK, tid_, sizeof mask, &mask) < 0) {
    return trace_error(*process_, "PTRACE_SETSIGMASK", errno);
  }
  prepared_ = true;
  return {};
}

Status RemoteThread::check_unfiltered() const {
  if (!filtered_) return {};
  return tl::unexpected(
      Error(ErrorCode::privilege,
            fmt::format("{} has a seccomp filter, which cannot be suspended from here",
                        process_->describe()))
          .with_remedy("Run vmsnap as root and without a seccomp filter of its own (a container's, "
                       "or one that systemd set for its service)."));
}

RemoteThread::RemoteThread(RemoteThread&& other) noexcept
    : process_(other.process_),
      tid_(std::exchange(other.tid_, 0)),
      saved_(other.saved_),
      saved_mask_(other.saved_mask_),
      prepared_(other.prepared_),
      stopped_(other.stopped_),
      filtered_(other.filtered_),
      swallowed_stop_(other.swallowed_stop_),
      syscall_instruction_(other.syscall_instruction_),
      scratch_(other.scratch_),
      scratch_saved_(std::move(other.scratch_saved_)) {}

RemoteThread::~RemoteThread() {
  if (tid_ == 0) return;
  if (prepared_) {
    if (!stopped_) stop_again();
    if (!scratch_saved_.empty()) (void)process_->write(scratch_, scratch_saved_);
    // First, because it says whether a signal waits for the thread.
    trace(PTRACE_SETSIGMASK, tid_, sizeof saved_mask_, &saved_mask_);
    (void)repeat_call_cut_short(*process_, tid_, saved_);
    (void)set_registers(*process_, tid_, saved_);
  }
  if (swallowed_stop_) ::kill(process_->pid(), SIGSTOP);
  trace(PTRACE_DETACH, tid_, 0, uint64_t{0});
}

// Of the signals it alone cannot be blocked. A step goes on without it, and whoever
// sent it is to find the process stopped all the same.
void RemoteThread::note_stop(int status) {
  if (WIFSTOPPED(status) && status >> 16 == 0 && WSTOPSIG(status) == SIGSTOP) swallowed_stop_ = true;
}

// A step that did not end in time (the process is in a frozen cgroup, or has hardly any
// processor): with our registers it must not be left, however long that takes.
void RemoteThread::stop_again() {
  for (;;) {
    if (!interrupt_start(*process_, tid_)) return;
    const auto status = wait_for_stop(*process_, tid_);
    if (status) note_stop(*status);
    if (status) return;  // it stands still, or has ended
    if (!process_->alive()) return;
  }
}

Result<int64_t> RemoteThread::call(long number, std::initializer_list<uint64_t> arguments) {
  user_regs_struct registers = saved_;
  registers.rip = syscall_instruction_.address();
  registers.rax = static_cast<uint64_t>(number);
  // Not in a system call any more: the kernel must not restart the old one here.
  registers.orig_rax = ~uint64_t{0};
  unsigned long long* const slots[] = {&registers.rdi, &registers.rsi, &registers.rdx,
                                       &registers.r10, &registers.r8,  &registers.r9};
  size_t slot = 0;
  for (const uint64_t argument : arguments) *slots[slot++] = argument;
  VMSNAP_CHECK(set_registers(*process_, tid_, registers));

  if (trace(PTRACE_SINGLESTEP, tid_, 0, uint64_t{0}) < 0) {
    return trace_error(*process_, "PTRACE_SINGLESTEP", errno);
  }
  stopped_ = false;
  for (;;) {
    const int status = VMSNAP_TRY(wait_for_stop(*process_, tid_));
    stopped_ = true;
    if (!WIFSTOPPED(status)) return fail(ErrorCode::vm, "{} ended", process_->describe());
    const user_regs_struct after = VMSNAP_TRY(get_registers(*process_, tid_));
    if (after.rip == syscall_instruction_.address() + 2 && WSTOPSIG(status) == SIGTRAP &&
        status >> 16 == 0) {
      return static_cast<int64_t>(after.rax);
    }
    // A stop of another kind (the VM is being stopped by job control): the step
    // is still to come.
    note_stop(status);
    if (trace(PTRACE_SINGLESTEP, tid_, 0, uint64_t{0}) < 0) {
      return trace_error(*process_, "PTRACE_SINGLESTEP", errno);
    }
    stopped_ = false;
  }
}

Result<RemotePtr> RemoteThread::scratch(size_t size) {
  const uint64_t below = (saved_.rsp - red_zone - size) & ~uint64_t{63};
  std::vector<std::byte> saved(size);
  VMSNAP_CHECK(process_->read(RemotePtr(below), saved));
  scratch_ = RemotePtr(below);
  scratch_saved_ = std::move(saved);
  return scratch_;
}

}  // namespace vmsnap
