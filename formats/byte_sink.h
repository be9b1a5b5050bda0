// Sequential writing of a file: as it is, or encrypted on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "formats/error.h"
#include "formats/image_layout.h"

namespace vmsnap {

// For one thread. Blocks on the disk.
class ByteSink {
 public:
  virtual ~ByteSink() = default;

  virtual Status append(std::span<const std::byte> bytes) = 0;
  virtual uint64_t offset() const = 0;  // of the next byte appended
  // What was appended is in the file once this has returned without an error.
  // The last call.
  virtual Status finish() = 0;

  Status pad_to(uint64_t alignment) {  // with zeros
    const std::vector<std::byte> zeros(layout::align_up(offset(), alignment) - offset());
    return append(zeros);
  }
};

}  // namespace vmsnap
