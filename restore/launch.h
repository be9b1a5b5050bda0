// Starting a VMM that must not be left half-started: until let_live() it dies
// with us, however we die.
//
// A guard process waits on a pipe from us. If the pipe closes before the word
// that the guest may run, it kills the VMM; it shares nothing else with us, so
// no signal to us reaches it. The VMM itself is told to begin (execve) only
// when its guard is there.
#pragma once

#include <sys/types.h>

#include <string>

#include "formats/error.h"
#include "formats/file.h"
#include "restore/launch_rules.h"
#include "snap/vmm/process.h"

namespace vmsnap {

class StartedVm {
 public:
  // Starts it in a session of its own, in the recorded working directory, with
  // no terminal; stdout and stderr go to `log_path`. Must be called while the
  // calling process has one thread. Descriptors that are not close-on-exec are
  // inherited (for -netdev tap,fd=N of the extra arguments). ErrorCode::vm when
  // it cannot be executed.
  static Result<StartedVm> start(const LaunchLine& line, const std::string& log_path);

  StartedVm(StartedVm&& other) noexcept = default;
  StartedVm& operator=(StartedVm&&) = delete;
  // Kills it, unless let_live() was called; waits for it and for the guard.
  ~StartedVm();

  const Process& process() const { return process_; }

  // Adds what a dead or unwilling VMM said last to an error: its exit status
  // and the end of its log.
  Error explain(Error error) const;

  // From now on it lives, with or without us. Ends the guard.
  Status let_live();

 private:
  StartedVm(Process process, Fd guard, pid_t guard_pid, std::string log_path)
      : process_(std::move(process)),
        guard_(std::move(guard)),
        guard_pid_(guard_pid),
        log_path_(std::move(log_path)) {}

  Process process_;
  Fd guard_;  // the pipe; none: it lives, or was moved from
  pid_t guard_pid_;
  std::string log_path_;
};

// Sends SIGKILL and waits until it has ended (a few seconds at most).
void kill_and_wait(const Process& process);

}  // namespace vmsnap
