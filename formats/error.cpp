#include "formats/error.h"

#include <cerrno>
#include <system_error>

namespace vmsnap {

int exit_status(ErrorCode code) {
  switch (code) {
    case ErrorCode::io: return 1;
    case ErrorCode::usage: return 2;
    case ErrorCode::refused: return 3;
    case ErrorCode::privilege: return 4;
    case ErrorCode::vm: return 5;
    case ErrorCode::discarded: return 6;
    case ErrorCode::no_space: return 7;
    case ErrorCode::exists: return 8;
    case ErrorCode::damaged: return 9;
    case ErrorCode::unsupported: return 10;
    case ErrorCode::pause_command: return 11;
    case ErrorCode::poisoned: return 12;
    case ErrorCode::stale: return 13;
    case ErrorCode::locked: return 14;
    case ErrorCode::some_failed: return 15;
    case ErrorCode::wrong_key: return 16;
    case ErrorCode::interrupted: return 130;
  }
  return 1;
}

Error Error::from_errno(int os_errno, std::string what, ErrorCode code) {
  // EFBIG is what a process sees at its file size limit: to a user, a full disk.
  if (os_errno == ENOSPC || os_errno == EDQUOT || os_errno == EFBIG) code = ErrorCode::no_space;
  Error error(code, fmt::format("{}: {}", what, std::generic_category().message(os_errno)));
  error.os_errno_ = os_errno;
  if (code == ErrorCode::no_space) error.remedy_ = "Free space there, or write somewhere else.";
  return error;
}

Error Error::with_remedy(std::string remedy) && {
  remedy_ = std::move(remedy);
  return std::move(*this);
}

Error Error::with_context(std::string_view context) && {
  message_ = fmt::format("{}: {}", context, message_);
  return std::move(*this);
}

}  // namespace vmsnap
