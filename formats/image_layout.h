// The bytes of an image file, version 1. vmsnap-image(5) describes the same in
// words; the two are changed together.
//
//   header block | page frames, end mark | 0.. | tree blocks | sections | 0.. | trailer block
//
// Everything is little-endian, and the file is written front to back. "Must be
// zero" is checked by every reader: a later version that gives such bytes a
// meaning sets an incompatible bit, or a new version number.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "formats/image_info.h"

namespace vmsnap::layout {

static_assert(std::endian::native == std::endian::little, "structures are copied as they are");

inline constexpr uint32_t format_version = 1;
inline constexpr uint64_t block_size = 4096;

using Magic = std::array<char, 8>;
using ImageId = std::array<uint8_t, 16>;

inline constexpr Magic header_magic = {'\x89', 'V', 'M', 'S', 'N', 'A', 'P', '\n'};
inline constexpr Magic trailer_magic = {'\x89', 'V', 'M', 'S', 'E', 'N', 'D', '\n'};

// Incompatible-feature bits that this code knows.
inline constexpr uint64_t incompatible_deltas = 1;  // there may be delta frames
inline constexpr uint64_t known_incompatible = incompatible_deltas;

// At offset 0. Magic, version and checksum stay where they are in all versions.
struct Header {
  Magic magic;
  uint32_t version;
  uint32_t reserved0;                  // must be zero
  uint64_t incompatible;               // a set bit that the reader does not know: unsupported
  uint64_t compatible;                 // unknown bits are ignored
  ImageId id;                          // random
  std::array<uint8_t, 4040> reserved;  // must be zero
  uint64_t checksum;                   // of all before it, seed 0
};
static_assert(sizeof(Header) == block_size && std::is_trivially_copyable_v<Header>);

// ---- Page frames: one or more pages, compressed together.

inline constexpr uint16_t codec_raw = 0;
inline constexpr uint16_t codec_zstd = 1;
// One page, compressed as what follows the page of another frame of one page, its
// base, which is before it in the file and is no delta. The payload begins with
// the offset of the base.
inline constexpr uint16_t codec_delta = 2;
inline constexpr uint16_t codec_end = 0xffff;  // the end mark, after the last frame
inline constexpr uint64_t frame_alignment = 8;
inline constexpr size_t max_frame_pages = 16;

struct FrameHeader {
  uint16_t codec = 0;
  uint8_t last_slot = 0;       // pages in the frame, minus one: 0..15
  uint8_t flags = 0;           // frame_sealed; the other bits must be zero
  uint32_t stored_length = 0;  // payload bytes; 1..pages*4096, exactly that if raw; end mark: 0;
                               // sealed: and a tag of seal_tag_bytes
  uint64_t checksum = 0;       // of the 8 bytes before it and the payload, seed_at(offset of frame)
};
static_assert(sizeof(FrameHeader) == 16);

// In packs of a sealed store only: the payload is encrypted and ends with its tag.
inline constexpr uint8_t frame_sealed = 1;
inline constexpr size_t seal_tag_bytes = 16;  // seal_tag_size of seal.h

inline constexpr size_t max_frame_bytes(size_t pages) {
  return sizeof(FrameHeader) + pages * page_size + seal_tag_bytes;
}

// ---- Page tree: blocks of 4096 bytes. Level 1 blocks are leaves.

inline constexpr uint64_t leaf_entries = 512;
inline constexpr uint64_t inner_references = 256;
inline constexpr uint32_t max_depth = 5;
inline constexpr uint64_t max_page_count = uint64_t{1} << 41;  // 5 levels: 8 PiB

// A subtree. {0, 0}: all its pages are zero and it takes no space.
struct Reference {
  uint64_t offset;    // of the block in the file, a multiple of 4096
  uint64_t checksum;  // of the block, seed_of_block(level, index)
};
static_assert(sizeof(Reference) == 16);

using LeafBlock = std::array<uint64_t, leaf_entries>;
using InnerBlock = std::array<Reference, inner_references>;
static_assert(sizeof(LeafBlock) == block_size && sizeof(InnerBlock) == block_size);

// Pages below one block of a level.
inline constexpr uint64_t pages_per_block(uint32_t level) {
  return leaf_entries << (8 * (level - 1));
}

// The least depth that holds page_count pages; the only one that is allowed.
inline constexpr uint32_t tree_depth(uint64_t page_count) {
  uint32_t depth = 1;
  while (depth < max_depth && pages_per_block(depth) < page_count) ++depth;
  return depth;
}

// ---- Sections and trailer.

enum class SectionType : uint32_t {
  none = 0,
  device_state = 1,
  metadata = 2,
  packs = 3,        // the files that page entries refer to: a snapshot in a store
  working_set = 4,  // pages in the order in which the guest first wrote them
  digest = 5,       // BLAKE2b-256 of all from frames_end on to this section
};

inline constexpr uint16_t section_must_understand = 1;  // flag; the other bits must be zero
inline constexpr uint64_t max_device_state = 256 << 20;
inline constexpr uint64_t max_metadata = 16 << 20;
inline constexpr uint64_t max_pack_number = 65535;

// One row of the section of packs; row k is for the pack number k + 1.
struct PackRow {
  ImageId id;
  uint64_t frames_end;           // of the pack file: no frame reaches past this byte
  uint64_t referenced;           // page entries that refer to it; 0: it is not needed
  std::array<uint8_t, 32> digest;  // BLAKE2b-256 of the pack's trailer block
};
static_assert(sizeof(PackRow) == 64);

inline constexpr uint64_t max_packs_section = max_pack_number * sizeof(PackRow);
inline constexpr uint64_t max_working_set = 8 << 20;  // bytes, 8 a page

// An unused slot is all zero.
struct Section {
  uint32_t type = 0;
  uint16_t codec = 0;  // codec_raw or codec_zstd
  uint16_t flags = 0;
  uint64_t offset = 0;  // a multiple of 8
  uint64_t stored_length = 0;
  uint64_t raw_length = 0;  // after decompression
  uint64_t checksum = 0;    // of the stored bytes, seed_at(offset)
};
static_assert(sizeof(Section) == 40);

inline constexpr size_t section_slots = 16;

// The last 4096 bytes. Magic, version and checksum stay where they are.
struct Trailer {
  Magic magic;
  uint32_t version;
  uint32_t depth;
  ImageId id;
  uint64_t file_length;
  uint64_t page_count;
  uint64_t zero_pages;
  uint64_t duplicate_pages;  // share the frame of another page
  uint64_t stored_pages;     // zero + duplicate + stored = page_count
  uint64_t frames_end;       // first byte after the end mark
  Reference root;
  std::array<Section, section_slots> sections;
  std::array<uint8_t, 3352> reserved;  // must be zero
  uint64_t checksum;                   // of all before it, seed 0
};
static_assert(sizeof(Trailer) == block_size && std::is_trivially_copyable_v<Trailer>);

inline constexpr uint64_t frames_begin = sizeof(Header);
inline constexpr uint64_t max_file_length = (uint64_t{1} << 40) * frame_alignment;

// ---- Seeds: the image and the place are part of every checksum, so that a
// structure that is read from the wrong place, or image, does not match.

inline uint64_t image_seed(const ImageId& id) {
  uint64_t seed;
  std::memcpy(&seed, id.data(), sizeof seed);
  return seed;
}

inline constexpr uint64_t seed_at(uint64_t image_seed, uint64_t offset) {
  return image_seed ^ offset;
}

inline constexpr uint64_t seed_of_block(uint64_t image_seed, uint32_t level, uint64_t index) {
  return image_seed ^ (uint64_t{level} << 56) ^ index;
}

inline constexpr uint64_t align_up(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace vmsnap::layout
