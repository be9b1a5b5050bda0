// Writes one image: page frames first, then the page tree, device state,
// metadata and trailer (vmsnap-image(5)).
//
// The file is only appended to; until finish() has returned it is not an image
// (no trailer). Naming and renaming the file is the caller's (AtomicFile).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "formats/error.h"
#include "formats/byte_sink.h"
#include "formats/frame_batch.h"
#include "formats/frame_sink.h"
#include "formats/image_info.h"
#include "formats/image_tail.h"
#include "formats/known_pages.h"

namespace vmsnap {

struct ImageWriterOptions {
  std::optional<int> level = {};  // of zstd; without, the one that pays
  // Whether pages become deltas of similar ones where that saves a tenth: a
  // smaller image, which takes three to four times as long to compress.
  bool deltas = false;
  // Entries of the duplicate-page hint table, 16 bytes each; older hints are
  // overwritten when it is full, which costs space, never data.
  size_t hint_entries = 1 << 20;
  // Of the table of similar pages, 16 bytes each, if there are deltas.
  size_t similar_slots = 1 << 20;
  // 64-bit content hash; tests replace it by one that always collides.
  std::function<uint64_t(std::span<const std::byte>)> hash = {};  // empty: XXH3-64

  int zstd_level() const { return level.value_or(deltas ? level_with_deltas : level_alone); }
};

class ImageWriter {
 public:
  // Compression state of one thread. Not shared between threads.
  class Encoder {
   public:
    // `between_pages` is called by the thread that writes, before each page that
    // takes a while, some microseconds, to compare or compress, and every few pages
    // else: for who has more urgent work, too.
    explicit Encoder(std::function<void()> between_pages = [] {});
    ~Encoder();
    Encoder(Encoder&&) noexcept;

   private:
    friend class ImageWriter;
    struct State;
    std::unique_ptr<State> state_;
  };

  // Writes through `fd` (borrowed, must outlive the writer) from offset 0.
  // `name` is used in errors. `page_count` bounds the page numbers; memory use
  // is 8 bytes per page of which something is stored, plus the hint table.
  static Result<std::unique_ptr<ImageWriter>> create(int fd, std::string name, uint64_t page_count,
                                                     ImageWriterOptions options = {});
  // The same, but the frames go to `frames`, whatever `known` has is not
  // stored again (null: nothing is known), and the rest goes to `manifest`, from
  // its start on. All are borrowed.
  static Result<std::unique_ptr<ImageWriter>> create_manifest(ByteSink& manifest, FrameSink& frames,
                                                              KnownPages* known, std::string name,
                                                              uint64_t page_count,
                                                              ImageWriterOptions options = {});
  ~ImageWriter();

  // Stores a batch of pages: numbers[k] is the page whose bytes are
  // data[k * 4096 .. +4096]. Any number of threads at once, each with its own
  // encoder; each page number at most once in the life of the writer. All-zero
  // pages cost nothing; a page equal (byte by byte, not only by hash) to one
  // already in the image, or to an earlier one of the batch, costs 8 bytes.
  // A page that another thread is storing at this moment counts as in the
  // image already: this call waits for that thread's write. Only a forgotten
  // hint, or many pages with one hash, make equal pages be stored twice.
  // Blocks on the disk.
  Result<PageCounts> write_pages(Encoder& encoder, std::span<const uint64_t> numbers,
                                 std::span<const std::byte> data);

  // The image's id, 32 hex digits, chosen at random by create().
  std::string id() const;

  // Pages never written read back as zero. Called once, after every
  // write_pages() has returned; fails if one of them did. `info` must have
  // regions of page_count pages in all; its id and the regions' first pages
  // are filled in here. The device state is at most 256 MiB, empty for none;
  // the working set is the pages that the guest wrote first, in their order.
  // Returns the size of the file in bytes. Does not fsync.
  Result<uint64_t> finish(const ImageInfo& info, std::span<const std::byte> device_state,
                          std::span<const uint64_t> working_set = {});

 private:
  struct State;
  explicit ImageWriter(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace vmsnap
