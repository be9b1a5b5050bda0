// ptrace(2) with its errors as values; shared by what borrows one thread and
// what stops all of them.
#pragma once

#include <sys/types.h>
#include <sys/user.h>

#include <cstdint>

#include "formats/error.h"
#include "snap/vmm/process.h"

namespace vmsnap {

// The raw call; -1 and errno on failure.
long trace(int request, pid_t tid, uint64_t address, const void* data);
long trace(int request, pid_t tid, uint64_t address, uint64_t data);

// "WHAT of PROCESS failed": ErrorCode::vm.
tl::unexpected<Error> trace_error(const Process& process, const char* what, int os_errno);

// Attaches without stopping. False: that thread has ended. Says who traces it
// already, or which privilege is missing.
Result<bool> seize_thread(const Process& process, pid_t tid);

// Asks a seized thread to stop; interrupt_finish() waits until it has, passing
// on signals that come before. Waits 5 s at most: a thread may be in
// uninterruptible sleep. False: the thread has ended.
Status interrupt_start(const Process& process, pid_t tid);
Result<bool> interrupt_finish(const Process& process, pid_t tid);

// The next stop of a thread: a waitpid(2) status.
Result<int> wait_for_stop(const Process& process, pid_t tid);

Result<user_regs_struct> get_registers(const Process& process, pid_t tid);
Status set_registers(const Process& process, pid_t tid, const user_regs_struct& registers);

// A thread whose waiting call our stop cut short shall not notice: with these registers
// it makes the call again, unless a signal waits for it. The call's time limit, if it
// had one, starts anew. False: they are as they were. For calls that end with EINTR
// after a stop, see signal(7).
bool repeat_call_cut_short(const Process& process, pid_t tid, user_regs_struct& registers);

// Whether the thread was stopped inside a system call.
inline bool in_system_call(const user_regs_struct& registers) {
  return static_cast<int64_t>(registers.orig_rax) >= 0;
}

}  // namespace vmsnap
