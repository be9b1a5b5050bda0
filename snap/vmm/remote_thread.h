// One thread of another process, stopped by ptrace(2), running system calls
// for us.
//
// The destructor puts every register and the signal mask back and detaches; an
// interrupted system call restarts as if nothing had happened, because the
// registers go back while the thread is in a signal-delivery-stop, where the
// kernel itself does the restart. All calls must come from the thread that
// seized. If the tracer dies, the kernel detaches, but nobody puts the
// registers back: so this is only ever used in a process of its own that
// nobody kills with us (see injector.h).
//
// Sources: ptrace(2), "Restart of system calls" in signal(7).
#pragma once

#include <sys/types.h>
#include <sys/user.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

#include "formats/error.h"
#include "snap/vmm/process.h"
#include "snap/vmm/remote_ptr.h"

namespace vmsnap {

class RemoteThread {
 public:
  // Seizes a thread that waits in a system call, or failing that one that is
  // not in a restartable sequence (rseq(2)), whose state a detour would lose.
  // Takes about a millisecond; gives up after a few seconds. ErrorCode::privilege
  // when ptrace is not allowed, ErrorCode::refused when a debugger is there.
  static Result<RemoteThread> seize(const Process& process);

  RemoteThread(RemoteThread&& other) noexcept;
  RemoteThread& operator=(RemoteThread&&) = delete;
  ~RemoteThread();

  pid_t tid() const { return tid_; }

  // ErrorCode::privilege if a seccomp filter is in force, which would kill the process
  // for a call that it does not know. To be asked before any call that not every VMM
  // makes itself; QEMU's filter lets ioctl(2), close(2) and mmap(2) pass.
  Status check_unfiltered() const;

  // Runs one system call; returns what it returned, -errno included. At most
  // six arguments.
  Result<int64_t> call(long number, std::initializer_list<uint64_t> arguments);

  // A place of at least `size` bytes (at most 1024) below the thread's stack
  // pointer whose contents are put back at the end. One at a time.
  Result<RemotePtr> scratch(size_t size);

 private:
  RemoteThread(const Process& process, pid_t tid) : process_(&process), tid_(tid) {}
  Status prepare();
  void stop_again();
  void note_stop(int status);

  const Process* process_;
  pid_t tid_;  // 0 after a move
  user_regs_struct saved_ = {};
  uint64_t saved_mask_ = 0;
  bool prepared_ = false;
  bool stopped_ = true;  // since it was seized, but for the time of a step
  bool filtered_ = false;
  bool swallowed_stop_ = false;  // a SIGSTOP came while we traced: it is owed
  RemotePtr syscall_instruction_;
  RemotePtr scratch_;
  std::vector<std::byte> scratch_saved_;
};

}  // namespace vmsnap
