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

namespace vmsnap {

class FrameEncoder {
 public:
  FrameEncoder();

  // zstd level of the frames that follow.
  void set_level(int level);

  // Writes a frame of one page to the front of `out`, which has room for
  // max_frame_bytes(1), and zeros up to frame_alignment. The checksum is left
  // out, since it depends on where the frame goes. Returns the bytes used, a
  // multiple of frame_alignment. A page that does not shrink is stored raw.
  size_t encode(std::span<const std::byte, page_size> page, std::span<std::byte> out);

  // Fills in the checksum of the frame at the front of `frame`.
  void seal(std::span<std::byte> frame, uint64_t seed);

 private:
  std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> context_;
  StreamChecksum checksum_;
};

class FrameDecoder {
 public:
  FrameDecoder();

  // Whether the fields can be those of a frame (not of the end mark).
  static bool plausible(const layout::FrameHeader& header);
  static size_t pages(const layout::FrameHeader& header) { return header.last_slot + size_t{1}; }

  // Whether the checksum is right; to be asked before decode().
  bool intact(const layout::FrameHeader& header, std::span<const std::byte> payload, uint64_t seed);

  // All pages of a plausible, intact frame; `out` is pages * page_size. False
  // if the payload is not exactly that many bytes.
  bool decode(const layout::FrameHeader& header, std::span<const std::byte> payload,
              std::span<std::byte> out);

 private:
  std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context_;
  StreamChecksum checksum_;
};

}  // namespace vmsnap
