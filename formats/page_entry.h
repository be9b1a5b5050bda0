// One page's entry in a leaf of the page tree: where its bytes are.
#pragma once

#include <cstdint>

#include "formats/image_layout.h"

namespace vmsnap {

// As 64 bits, from the high end: kind 4, slot 4, pack 16, offset 40. The entry
// 0 is a zero page.
struct PageEntry {
  static constexpr uint64_t kind_frame = 1;

  uint64_t kind = kind_frame;
  uint64_t slot = 0;    // which page of the frame
  uint64_t pack = 0;    // which file of a store; 0: this file
  uint64_t offset = 0;  // of the frame header, in bytes, a multiple of 8, below 8 TiB

  uint64_t pack_bits() const {
    return kind << 60 | slot << 56 | pack << 40 | offset / layout::frame_alignment;
  }

  static PageEntry from_bits(uint64_t bits) {
    return {.kind = bits >> 60,
            .slot = bits >> 56 & 0xf,
            .pack = bits >> 40 & 0xffff,
            .offset = (bits & ((uint64_t{1} << 40) - 1)) * layout::frame_alignment};
  }
};

}  // namespace vmsnap
