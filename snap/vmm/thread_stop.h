// All threads of a process standing still, by ptrace(2).
//
// The kernel lets them go when this object, its thread or our whole process
// ends, however it ends; system calls that were interrupted restart. Construct
// and destroy in the same thread.
#pragma once

#include <sys/types.h>

#include <vector>

#include "formats/error.h"
#include "snap/vmm/process.h"

namespace vmsnap {

class ThreadStop {
 public:
  // Returns when every thread stands still, also those that are started
  // meanwhile. ErrorCode::privilege, ErrorCode::refused (a debugger is there),
  // ErrorCode::vm (it ended, or a thread does not stop within seconds).
  static Result<ThreadStop> stop(const Process& process);

  ThreadStop(ThreadStop&& other) noexcept : process_(other.process_), tids_(std::move(other.tids_)) {
    other.tids_.clear();
  }
  ThreadStop& operator=(ThreadStop&&) = delete;
  ~ThreadStop() { resume(); }

  void resume();

 private:
  explicit ThreadStop(const Process& process) : process_(&process) {}

  const Process* process_;
  std::vector<pid_t> tids_;
};

}  // namespace vmsnap
