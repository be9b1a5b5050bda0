// One wording for everything that is found wrong in an image.
#pragma once

#include <string>
#include <utility>

#include "formats/error.h"

namespace vmsnap {

// ErrorCode::damaged, "NAME is damaged: what".
template <class... Args>
Error damage(const std::string& name, fmt::format_string<Args...> format, Args&&... args) {
  const std::string what = fmt::format(format, std::forward<Args>(args)...);
  return Error(ErrorCode::damaged, fmt::format("{} is damaged: {}", name, what))
      .with_remedy(
          "Use another copy of the image, if there is one; 'vmsnap verify' names every "
          "page that is lost in this one.");
}

template <class... Args>
tl::unexpected<Error> damaged(const std::string& name, fmt::format_string<Args...> format,
                              Args&&... args) {
  return tl::unexpected<Error>(damage(name, format, std::forward<Args>(args)...));
}

// Whether the bytes are not there any more: a check of ours failed, or the disk
// or the file system says so.
bool says_damage(const Error& error);

// Whether to read once more is of no use: damage, or the wrong key. Anything
// else (no descriptor, no memory, no permission) may pass, and then the bytes
// are there.
bool is_lasting(const Error& error);

}  // namespace vmsnap
