#include "formats/byte_sink.h"

#include <vector>

#include "formats/image_layout.h"

namespace vmsnap {

Status ByteSink::pad_to(uint64_t alignment) {
  const std::vector<std::byte> zeros(layout::align_up(offset(), alignment) - offset());
  return append(zeros);
}

}  // namespace vmsnap
