// Page frames in memory: pages to frame bytes and back.
//
// Both classes hold one thread's compression state; use each from one thread
// at a time. Nothing here blocks.
#pragma once

#include <zstd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
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

  // The same for a delta frame, with the page of its base. Returns 0 if it would
  // take more than `limit` bytes, which are at most max_frame_bytes(1).
  size_t encode_delta(std::span<const std::byte, page_size> page,
                      std::span<const std::byte, page_size> base, bool sealed, size_t limit,
                      std::span<std::byte> out);

  // Where the base of the delta frame at the front of `frame` is, in its file.
  // Before finish().
  static void set_base(std::span<std::byte> frame, uint64_t offset);

  // Encrypts the frame at the front of `frame` if the site has a key, and
  // fills in its checksum.
  void finish(std::span<std::byte> frame, const FrameSite& site);

 private:
  size_t add_header(layout::FrameHeader header, size_t length, bool sealed,
                    std::span<std::byte> out);

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

  // Whether the checksum is right; to be asked before open(). Needs no key.
  bool intact(const layout::FrameHeader& header, std::span<const std::byte> payload,
              const FrameSite& site);

  // The content of a plausible, intact frame: decrypted, in place, if the site has
  // a key. Nothing if it is not what was sealed with this key at this site.
  std::optional<std::span<const std::byte>> open(const layout::FrameHeader& header,
                                                 std::span<std::byte> payload,
                                                 const FrameSite& site);

  // Of a delta frame's content: where its base must be, whatever it says.
  static uint64_t base_offset(std::span<const std::byte> content);

  // All pages of an opened frame; `out` is pages * page_size, `base` the page of a
  // delta frame's base, else not looked at. False if it is not exactly that many
  // bytes.
  bool decode(const layout::FrameHeader& header, std::span<const std::byte> content,
              std::span<const std::byte> base, std::span<std::byte> out);

 private:
  std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context_;
  StreamChecksum checksum_;
};

}  // namespace vmsnap
