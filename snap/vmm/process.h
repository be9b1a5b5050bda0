// A process that is not ours, held so that its number cannot come to mean
// another one.
//
// Every call says ErrorCode::vm when the process is gone. Safe from any thread.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "snap/vmm/remote_ptr.h"

namespace vmsnap {

class Process {
 public:
  // pidfd_open(2). Blocks nothing, touches nothing.
  static Result<Process> open(pid_t pid);

  pid_t pid() const { return pid_; }
  int pidfd() const { return pidfd_.get(); }
  bool alive() const { return !wait_for_end(std::chrono::milliseconds(0)); }
  // Whether it has ended; waits for that up to `limit`.
  bool wait_for_end(std::chrono::milliseconds limit) const;
  // SIGKILL, through the pidfd: never hits another process of that number.
  void kill() const;
  // Clock ticks since boot at which it started, field 22 of proc(5) stat: with
  // the pid, names one process across restarts of ours.
  uint64_t start_time() const { return start_time_; }

  // What an error means if the process may have caused it by ending meanwhile:
  // ErrorCode::vm then, the error as it is otherwise. Waits up to a second when
  // the error looks like it.
  Error explain(Error error) const;

  // "name (pid N)", for messages.
  std::string describe() const;

  Result<std::string> executable() const;                // /proc/PID/exe
  Result<std::vector<std::string>> arguments() const;    // /proc/PID/cmdline
  Result<std::string> working_directory() const;         // /proc/PID/cwd
  // Value of "Name:" in /proc/PID/status, trimmed; empty if it is not there.
  Result<std::string> status_field(std::string_view name) const;
  Result<std::string> thread_status_field(pid_t tid, std::string_view name) const;
  // The processor that a thread of it ran on last.
  Result<int> last_processor(pid_t tid) const;
  // Thread numbers at this moment.
  Result<std::vector<pid_t>> threads() const;
  // What each of its descriptors is open on: (number, link text).
  Result<std::vector<std::pair<int, std::string>>> descriptors() const;

  // Copies memory of the process (process_vm_readv/writev, whole length or an
  // error). Reading may fault pages in, and waits where a userfaultfd makes it
  // wait.
  Status read(RemotePtr from, std::span<std::byte> to) const;
  Status write(RemotePtr to, std::span<const std::byte> from) const;

  // Has the kernel put the small pages of a range together to huge ones
  // (process_madvise(2), MADV_COLLAPSE, Linux 6.1); its accesses to them wait
  // meanwhile. An error if the kernel cannot or will not.
  Status collapse(RemoteRange range) const;

  // A duplicate of its descriptor `remote_fd` (pidfd_getfd(2)).
  Result<Fd> take_descriptor(int remote_fd) const;

 private:
  pid_t pid_ = 0;
  uint64_t start_time_ = 0;
  Fd pidfd_;
};

}  // namespace vmsnap
