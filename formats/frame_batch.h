// Writes pages to a sink, a batch of frames at a time.
//
// With `similar`, a page that has much in common with one stored before, in the
// same file, becomes a delta frame with that as its base (vmsnap-image(5)). What
// stands alone is added to `similar`: only that can be a base.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "formats/error.h"
#include "formats/frame_sink.h"
#include "formats/image_layout.h"
#include "formats/page_codec.h"
#include "formats/similar_pages.h"

namespace vmsnap {

// The zstd level that pays: of frames alone, and where deltas are looked for
// (vmsnap-image(5), "Why frames are as they are").
inline constexpr int level_alone = -1;
inline constexpr int level_with_deltas = 5;

// One thread's buffers.
class FrameBatch {
 public:
  static constexpr size_t max_pages = 256;  // bounds the buffers to 1 MiB

  struct Page {
    std::span<const std::byte, page_size> bytes;
    uint64_t hash = 0;   // for the sink's note
    uint64_t entry = 0;  // out: its packed PageEntry
  };

  // Writes all pages, at most max_pages, with one write of the sink, and sets
  // their entries. `similar` may be null, and is borrowed. `before_each` is called
  // before each page is compressed. Returns the bytes they take. Blocks on the
  // disk; after an error the sink is of no use.
  Result<uint64_t> write(FrameSink& sink, int level, SimilarPages* similar, std::span<Page> pages,
                         const std::function<void()>& before_each = [] {});

 private:
  // Of a frame in the batch.
  struct Start {
    uint64_t offset = 0;  // in the batch
    uint64_t base = 0;    // of a delta: an entry, or the number of a page of the batch, plus one
  };

  Result<uint64_t> encode(FrameSink& sink, std::optional<uint64_t> pack, std::span<Page> pages,
                          const std::function<void()>& before_each);
  Result<size_t> try_delta(FrameSink& sink, std::optional<uint64_t> pack,
                           std::span<const Page> pages, size_t k, size_t alone);
  void finish(const FramePlace& place, std::span<Page> pages);

  FrameEncoder encoder_;
  std::vector<std::byte> frames_;
  std::vector<Start> starts_;
  std::vector<FrameNote> notes_;

  SimilarPages* similar_ = nullptr;
  bool uses_pack_ = false;  // some base is not in the batch
  std::vector<std::pair<size_t, Sketch>> standing_alone_;
  std::unordered_map<uint64_t, uint64_t> in_batch_;  // hashes of sketches: page plus one
  std::vector<uint64_t> candidates_;
  std::array<std::byte, page_size> base_;
  std::array<std::byte, layout::max_frame_bytes(1)> delta_;
};

}  // namespace vmsnap
