// Pages of an image decoded ahead of the background fill, by threads of its
// own, into a bounded number of buffers.
//
// The unit is an extent: up to 512 neighbouring pages of a served range. First
// come those of the working set (recorded_working_set.h), in its order: its
// pages alone, or with those between two of them that are near each other. Then
// the rest, in extents of 2 MiB (also one huge page) that have data; extents
// without data are never visited. Memory: `slots` extents of 2 MiB, no more;
// when all are full the decoders wait.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "formats/file.h"
#include "formats/image_reader.h"
#include "restore/page_marks.h"
#include "snap/vmm/remote_ptr.h"

namespace vmsnap {

// A piece of a VMM's memory and the image pages that belong there.
struct ServedRange {
  RemoteRange range;          // whole units
  uint64_t first_page = 0;    // image page of its first 4 KiB
  uint64_t unit = page_size;  // bytes of one page of the mapping: 4 KiB or 2 MiB
  std::string name;           // for messages

  uint64_t page_count() const { return range.length / page_size; }
  RemotePtr address_of(uint64_t image_page) const {
    return range.start + (image_page - first_page) * page_size;
  }
  uint64_t page_at(RemotePtr address) const {
    return first_page + (address - range.start) / page_size;
  }
};

// What is loaded that nobody has touched yet.
enum class Prefetch { none, working_set, all };

// "none", "working-set", "all".
std::string_view prefetch_name(Prefetch prefetch);
Result<Prefetch> parse_prefetch(std::string_view name);

struct DecodedExtent {
  static constexpr uint64_t max_pages = 512;
  // later: it cannot be read now. Of a huge page the last of these counts.
  enum class State : uint8_t { zero, data, later, unreadable };

  size_t range = 0;         // index into the served ranges
  uint64_t first_page = 0;  // image page
  uint64_t pages = 0;
  std::array<State, max_pages> states = {};
  std::optional<Error> delayed;  // why some are `later`
  std::unique_ptr<std::byte[]> bytes;  // pages * 4096; zeros where the state is not `data`

  std::span<const std::byte> bytes_of(uint64_t index, uint64_t count) const {
    return {bytes.get() + index * page_size, count * page_size};
  }
};

class PageSource {
 public:
  // Starts `threads` decoders; 0: by the number of CPUs, at most 4. The reader,
  // the marks (for skipping what is no longer wanted: a hint) and the ranges must
  // outlive this. Errors: eventfd(2) or memory.
  static Result<std::unique_ptr<PageSource>> start(const ImageReader& reader,
                                                   const PageMarks& marks,
                                                   const std::vector<ServedRange>& ranges,
                                                   Prefetch prefetch, unsigned threads);
  // Stops the decoders and waits for them: at most one extent's decoding.
  ~PageSource();
  PageSource(const PageSource&) = delete;
  PageSource& operator=(const PageSource&) = delete;

  // One thread calls these; none of them waits for the disk.
  // The next decoded extent, null if none is ready. Give it back when done.
  DecodedExtent* take();
  void give_back(DecodedExtent* extent);
  // Every extent was decoded, taken and given back.
  bool exhausted() const;
  // Readable while something is ready, and when all is decoded; a take() that
  // finds nothing clears it.
  int ready_fd() const { return ready_.get(); }

 private:
  // A part of the working set: neighbouring pages of one range.
  struct Run {
    size_t range;
    uint64_t first_page;
    uint64_t pages;
    size_t rank;  // the place of its first page in the working set
  };

  PageSource(const ImageReader& reader, const PageMarks& marks,
             const std::vector<ServedRange>& ranges, Prefetch prefetch)
      : reader_(reader), marks_(marks), ranges_(ranges), prefetch_(prefetch) {}

  void order_working_set();
  Status start_decoders(unsigned count);
  void run_decoder();
  bool claim(DecodedExtent& extent);
  bool claim_of_rest(DecodedExtent& extent);
  void decode(DecodedExtent& extent) const;
  void signal_ready() const;

  const ImageReader& reader_;
  const PageMarks& marks_;
  const std::vector<ServedRange>& ranges_;
  const Prefetch prefetch_;
  Fd ready_;

  std::mutex claim_mutex_;  // held while the page tree is read: never by the taker
  bool ordered_ = false;    // working_set_ was read: by a decoder, because it is on the disk
  std::vector<Run> working_set_;
  size_t next_of_working_set_ = 0;
  size_t next_range_ = 0;
  uint64_t next_page_ = 0;

  mutable std::mutex queue_mutex_;
  std::condition_variable slot_free_;
  std::vector<std::unique_ptr<DecodedExtent>> slots_;
  std::vector<DecodedExtent*> free_;
  std::deque<DecodedExtent*> decoded_;
  unsigned decoders_running_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace vmsnap
