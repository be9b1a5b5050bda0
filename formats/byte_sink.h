// Where bytes are written one after the other: a plain file, or a sealed one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "formats/error.h"

namespace vmsnap {

// For one thread. Blocks on the disk.
class ByteSink {
 public:
  virtual ~ByteSink() = default;

  virtual Status append(std::span<const std::byte> bytes) = 0;
  // Where the next byte will be, as a reader of the file sees it.
  virtual uint64_t offset() const = 0;
  // After the last append: what was appended is in the file (not yet on the
  // disk) if this returns without an error.
  virtual Status finish() = 0;

  Status pad_to(uint64_t alignment);  // with zeros
};

}  // namespace vmsnap
