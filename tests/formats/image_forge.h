// Makes checksums right again in an image that was changed on purpose, so that
// tests and fuzzers reach what lies behind them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "formats/checksum.h"
#include "formats/image_layout.h"
#include "formats/page_codec.h"
#include "formats/page_entry.h"

namespace vmsnap {

class ImageForge {
 public:
  // `image` is changed in place.
  explicit ImageForge(std::span<std::byte> image) : image_(image) {}

  // Everything that can be found from the trailer, as far as it is inside.
  // The header and trailer get the right magic, version and lengths only if
  // `also_lengths`.
  void mend(bool also_lengths = false) {
    if (image_.size() < sizeof(layout::Header) + sizeof(layout::Trailer)) return;
    auto header = get<layout::Header>(0);
    const uint64_t trailer_at = image_.size() - sizeof(layout::Trailer);
    auto trailer = get<layout::Trailer>(trailer_at);
    if (also_lengths) {
      header.magic = layout::header_magic;
      trailer.magic = layout::trailer_magic;
      header.version = trailer.version = layout::format_version;
      header.incompatible &= layout::known_incompatible;
      trailer.id = header.id;
      trailer.file_length = image_.size();
    }
    seed_ = layout::image_seed(header.id);
    seal(header);
    put(0, header);
    if (trailer.depth >= 1 && trailer.depth <= layout::max_depth) {
      mend_block(trailer.depth, 0, trailer.root);
    }
    if (trailer.frames_end >= sizeof(layout::FrameHeader)) {
      mend_frame(trailer.frames_end - sizeof(layout::FrameHeader));
    }
    for (layout::Section& section : trailer.sections) {
      if (section.type == 0 || !inside(section.offset, section.stored_length)) continue;
      section.checksum = checksum(image_.subspan(section.offset, section.stored_length),
                                  layout::seed_at(seed_, section.offset));
    }
    seal(trailer);
    put(trailer_at, trailer);
  }

  template <class T>
  T get(uint64_t offset) const {
    T value;
    std::memcpy(&value, image_.data() + offset, sizeof value);
    return value;
  }

  template <class T>
  void put(uint64_t offset, const T& value) {
    std::memcpy(image_.data() + offset, &value, sizeof value);
  }

  uint64_t trailer_offset() const { return image_.size() - sizeof(layout::Trailer); }

 private:
  template <class Block>
  static void seal(Block& block) {
    const auto bytes = std::as_bytes(std::span(&block, 1));
    block.checksum = checksum(bytes.first(offsetof(Block, checksum)), 0);
  }

  bool inside(uint64_t offset, uint64_t length) const {
    return offset <= image_.size() && length <= image_.size() - offset;
  }

  // Bounded: references may form anything.
  void mend_block(uint32_t level, uint64_t index, layout::Reference& reference) {
    if (reference.offset == 0 || !inside(reference.offset, layout::block_size)) return;
    if (++blocks_ > 64) return;
    for (size_t k = 0; level > 1 && k < layout::inner_references; ++k) {
      const uint64_t at = reference.offset + k * sizeof(layout::Reference);
      auto child = get<layout::Reference>(at);
      mend_block(level - 1, index * layout::inner_references + k, child);
      put(at, child);
    }
    for (size_t k = 0; level == 1 && k < layout::leaf_entries; ++k) {
      const auto entry = get<uint64_t>(reference.offset + k * sizeof(uint64_t));
      if (entry != 0) mend_frame(PageEntry::from_bits(entry).offset);
    }
    reference.checksum = checksum(image_.subspan(reference.offset, layout::block_size),
                                  layout::seed_of_block(seed_, level, index));
  }

  void mend_frame(uint64_t offset) {
    if (!inside(offset, sizeof(layout::FrameHeader))) return;
    const auto header = get<layout::FrameHeader>(offset);
    if (!inside(offset, sizeof header + uint64_t{header.stored_length})) return;
    FrameEncoder().finish(image_.subspan(offset), {.offset = offset, .seed = seed_});
  }

  std::span<std::byte> image_;
  uint64_t seed_ = 0;
  int blocks_ = 0;
};

}  // namespace vmsnap
