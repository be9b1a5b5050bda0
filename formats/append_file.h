// Sequential, buffered writing at a position of one's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "formats/error.h"

namespace vmsnap {

// For one thread. Blocks on the disk. What was appended is in the file once
// flush() has returned without an error.
class AppendFile {
 public:
  // `fd` is borrowed.
  AppendFile(int fd, std::string name, uint64_t offset);

  Status append(std::span<const std::byte> bytes);
  Status pad_to(uint64_t alignment);  // with zeros
  Status flush();

  uint64_t offset() const { return flushed_ + buffer_.size(); }

 private:
  const int fd_;
  const std::string name_;
  uint64_t flushed_;
  std::vector<std::byte> buffer_;
};

}  // namespace vmsnap
