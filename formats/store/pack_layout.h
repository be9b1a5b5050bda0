// The bytes of a pack, versions 1 and 2: page frames of a store, written once.
// vmsnap-store(5) describes the same in words; the two are changed together.
//
//   header block | page frames, end mark | 0.. | segments | frame table | 0.. | trailer block
//
// Frames and end mark are as in an image (image_layout.h), with the pack's id
// for the image's. Everything is little-endian; "must be zero" is checked.
#pragma once

#include "formats/digest.h"
#include "formats/image_layout.h"

namespace vmsnap::layout {

inline constexpr Magic pack_magic = {'\x89', 'V', 'M', 'P', 'A', 'C', 'K', '\n'};
inline constexpr Magic pack_end_magic = {'\x89', 'V', 'M', 'P', 'E', 'N', 'D', '\n'};
inline constexpr uint32_t pack_version = 1;
inline constexpr uint32_t pack_version_deltas = 2;  // there may be delta frames, no more

inline constexpr uint32_t pack_sealed = 1;  // flag; the other bits must be zero

struct PackHeader {
  Magic magic;
  uint32_t version;
  uint32_t flags;
  ImageId id;                          // random
  std::array<uint8_t, 4056> reserved;  // must be zero
  uint64_t checksum;                   // of all before it, seed 0
};
static_assert(sizeof(PackHeader) == block_size);

// Neighbouring frames that were written in one go, and their digest; the
// segments of a pack follow each other from frames_begin to the end mark.
struct PackSegment {
  uint64_t offset;
  uint64_t length;  // bytes, at least 1, at most max_segment
  Digest digest;    // BLAKE2b-256 of the bytes
};
static_assert(sizeof(PackSegment) == 48);
inline constexpr uint64_t max_segment = 2 << 20;

// A frame; in the order of the file. From these an index can be made again.
struct PackFrame {
  uint64_t hash;    // of the page: XXH3-64, of a sealed store SipHash with a derived key
  uint64_t offset;  // of the frame
};
static_assert(sizeof(PackFrame) == 16);

inline constexpr uint64_t max_pack_bytes = uint64_t{1} << 31;
// A frame takes 24 bytes or more.
inline constexpr uint64_t max_pack_frames = max_pack_bytes / 24;
inline constexpr uint64_t max_pack_segments = max_pack_frames;

struct PackTrailer {
  Magic magic;
  uint32_t version;
  uint32_t flags;
  ImageId id;
  uint64_t file_length;
  uint64_t frames_end;        // first byte after the end mark
  uint64_t segments_offset;   // of PackSegment, a multiple of 8
  uint64_t segment_count;
  uint64_t table_offset;      // of PackFrame, right behind them; sealed: and a tag
  uint64_t frame_count;
  Digest tables_digest;       // BLAKE2b-256 of segments and frame table as stored
  std::array<uint8_t, 3976> reserved;  // must be zero
  uint64_t checksum;                   // of all before it, seed 0
};
static_assert(sizeof(PackTrailer) == block_size);

}  // namespace vmsnap::layout
