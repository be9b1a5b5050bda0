// Page frames in memory: pages to frame bytes and back.
//
// Both classes hold one thread's compression state; use each from one thread
// at a time. Nothing here blocks.
#pragma once

#include <zstd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "formats/checksum.h"
#include "formats/image_layout.h"
#include "formats/secret_key.h"

namespace vmsnap {

// Where a frame is, or will be: what its checksum and its encryption are bound to.
struct FrameSite {
  uint64_t offset = 0;             // in its file
  uint64_t seed = 0;               // the file's
  const SecretKey* key = nullptr;  // null: not sealed
};

class FrameEncoder {
 public:
  FrameEncoder();

  // zstd level of the frames that follow.
  void set_level(int level);

  // Writes a frame of one page to the front of `out`, which has room for
  // max_frame_bytes(1), and zeros up to frame_alignment. The checksum is left
  // out, and room for the tag if it will be sealed, since both depend on where
  // the frame goes. Returns the bytes used, a multiple of frame_alignment. A
  // page that does not shrink is stored raw.
  size_t encode(std::span<const std::byte, page_size> page, bool sealed, std::span<std::byte> out);

  // Encrypts the frame at the front of `frame` if the site has a key, and
  // fills in its checksum.
  void finish(std::span<std::byte> frame, const FrameSite& site);

 private:
  std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> context_;
  StreamChecksum checksum_;
};

// The frame header that ends the frames of a file.
layout::FrameHeader end_mark(const FrameSite& site);

class FrameDecoder {
 public:
  FrameDecoder();

  // Whether the fields can be those of a frame (not of the end mark) of a file
  // whose frames are sealed, or are not.
  static bool plausible(const layout::FrameHeader& header, bool sealed);
  static size_t pages(const layout::FrameHeader& header) { return header.last_slot + size_t{1}; }

  // Whether the checksum is right; to be asked before decode(). Needs no key.
  bool intact(const layout::FrameHeader& header, std::span<const std::byte> payload,
              const FrameSite& site);

  // All pages of a plausible, intact frame; `out` is pages * page_size, and
  // `payload` is decrypted in place. False if it is not exactly that many
  // bytes, or not what was sealed with this key at this site.
  bool decode(const layout::FrameHeader& header, std::span<std::byte> payload,
              const FrameSite& site, std::span<std::byte> out);

 private:
  std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context_;
  StreamChecksum checksum_;
};

}  // namespace vmsnap
