// Errors are values: a code that decides the exit status, the raw errno where
// there was one, and a sentence for the person at the prompt.
//
// Nothing in the project throws across a function boundary, prints, or exits,
// except the program's main. Any thread may make, move and read an Error.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

namespace vmsnap {

// One code per cause that a script would want to tell apart.
enum class ErrorCode {
  usage,          // the command line is wrong
  refused,        // cannot be captured right; the VM was not touched
  privilege,      // the kernel did not let us attach
  vm,             // the VM, its monitor or its process misbehaved or went away
  discarded,      // guest memory vanished before it was copied; no image made
  no_space,       // a disk or quota is full
  exists,         // the output is there already
  damaged,        // a file is not what its checksums say
  unsupported,    // a newer format version, or a kernel that lacks a feature
  pause_command,  // the --in-pause command failed or took too long
  poisoned,       // restored, but some pages could not be read back
  stale,          // the newest snapshot is older than it may be
  locked,         // somebody else is at work in the store
  some_failed,    // a backup run went on, but not all of it went well
  wrong_key,      // sealed, and not with the key that was given
  interrupted,    // a signal asked us to stop
  io,             // any other system call that failed
};

// The process exit status for each code; listed in vmsnap(1).
int exit_status(ErrorCode code);

class Error {
 public:
  Error(ErrorCode code, std::string message) : code_(code), message_(std::move(message)) {}

  // An error from a failed system call. `what` names the operation and the
  // object ("cannot write /backup/vm.img"); errno's own text is appended, and
  // ENOSPC, EDQUOT and EFBIG become ErrorCode::no_space.
  static Error from_errno(int os_errno, std::string what, ErrorCode code = ErrorCode::io);

  ErrorCode code() const { return code_; }
  int os_errno() const { return os_errno_; }  // 0 when no system call failed
  const std::string& message() const { return message_; }
  const std::string& remedy() const { return remedy_; }  // may be empty

  // What the user can do next, one sentence.
  Error with_remedy(std::string remedy) &&;
  // Puts "context: " in front of the message.
  Error with_context(std::string_view context) &&;

 private:
  ErrorCode code_;
  int os_errno_ = 0;
  std::string message_;
  std::string remedy_;
};

template <class T>
using Result = tl::expected<T, Error>;
using Status = Result<void>;

template <class... Args>
tl::unexpected<Error> fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  return tl::unexpected<Error>(Error(code, fmt::format(format, std::forward<Args>(args)...)));
}

// fail_errno(errno, "cannot read {}", path)
template <class... Args>
tl::unexpected<Error> fail_errno(int os_errno, fmt::format_string<Args...> format, Args&&... args) {
  return tl::unexpected<Error>(
      Error::from_errno(os_errno, fmt::format(format, std::forward<Args>(args)...)));
}

}  // namespace vmsnap

// Yields the value of a Result, or returns its error from the calling function.
// A statement expression (GNU C), so that a value can be moved out in one line;
// each use has a name of its own, so that they can be nested.
#define VMSNAP_TRY(expression) VMSNAP_TRY_NAMED(expression, VMSNAP_UNIQUE(vmsnap_try_))
#define VMSNAP_TRY_NAMED(expression, name)                              \
  ({                                                                    \
    auto&& name = (expression);                                         \
    if (!name) return ::tl::unexpected(std::move(name).error());        \
    *std::move(name);                                                   \
  })

// The same for a Status, which has no value.
#define VMSNAP_CHECK(expression) VMSNAP_CHECK_NAMED(expression, VMSNAP_UNIQUE(vmsnap_check_))
#define VMSNAP_CHECK_NAMED(expression, name)                            \
  do {                                                                  \
    auto&& name = (expression);                                         \
    if (!name) return ::tl::unexpected(std::move(name).error());        \
  } while (false)

#define VMSNAP_UNIQUE(prefix) VMSNAP_JOIN(prefix, __COUNTER__)
#define VMSNAP_JOIN(a, b) VMSNAP_JOIN_EXPANDED(a, b)
#define VMSNAP_JOIN_EXPANDED(a, b) a##b
