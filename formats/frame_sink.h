// Where the frames of pages go while an image is written: the image's own
// file, or the packs of a store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "formats/error.h"
#include "formats/image_info.h"
#include "formats/secret_key.h"

namespace vmsnap {

// Room for a batch of frames, side by side in one file.
struct FramePlace {
  uint64_t pack = 0;     // what the page entries say; 0: the image's own file
  uint64_t offset = 0;   // in the file, bytes
  uint64_t seed = 0;     // the first 8 bytes of the file's id
  const SecretKey* key = nullptr;  // the frames are sealed with it; null: they are not
};

// A frame in a batch, and the hash of the page in it.
struct FrameNote {
  uint64_t hash = 0;
  uint64_t offset = 0;  // in the file
};

// All members: any number of threads; they block on the disk.
class FrameSink {
 public:
  virtual ~FrameSink() = default;

  // `bytes` are a multiple of frame_alignment. What was reserved is written
  // once, or the sink is of no use any more.
  virtual Result<FramePlace> reserve(uint64_t bytes) = 0;

  // Where the next batch goes, most likely: a pack number, or nothing if a new
  // pack will be begun. A hint.
  virtual std::optional<uint64_t> next_pack() const { return 0; }
  // As reserve(), but nothing is reserved if it would be in another pack.
  virtual Result<std::optional<FramePlace>> reserve_in(uint64_t, uint64_t bytes) {
    return VMSNAP_TRY(reserve(bytes));
  }

  virtual Status write(const FramePlace& place, std::span<const std::byte> frames,
                       std::span<const FrameNote> notes) = 0;

  // Whether places have a key.
  virtual bool sealed() const = 0;

  // The page that an entry refers to, whose write() has returned.
  virtual Status read(uint64_t entry, std::span<std::byte, page_size> out) const = 0;

  // Once, after every write() has returned: ends the files. Returns the bytes
  // that frames take in the image's own file, from its start on: where the
  // page tree may begin.
  virtual Result<uint64_t> close() = 0;

  // The section of packs: rows of layout::PackRow for the files that entries
  // refer to; empty if all frames are in the image's own file. After close().
  // references[n]: page entries that refer to pack number n.
  virtual std::vector<std::byte> packs_section(const std::vector<uint64_t>& references) const {
    (void)references;
    return {};
  }
};

}  // namespace vmsnap
