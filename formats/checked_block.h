// Blocks that end with the checksum of all before it: headers and trailers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "formats/checksum.h"

namespace vmsnap {

// `Block` is a trivially copyable structure whose last member is `checksum`.
template <class Block>
uint64_t block_checksum(const Block& block) {
  const auto bytes = std::as_bytes(std::span(&block, 1));
  return checksum(bytes.first(offsetof(Block, checksum)), 0);
}

inline bool all_zero(std::span<const uint8_t> bytes) {
  return std::ranges::all_of(bytes, [](uint8_t byte) { return byte == 0; });
}

}  // namespace vmsnap
