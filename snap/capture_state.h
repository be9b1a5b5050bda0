// What the threads of one capture share, and the one way in which a page is
// copied.
//
// The rule that makes the image one instant: a unit is copied, then its
// write-protect mark is looked at again, and only then is it freed. The mark
// was set at the instant; while it is there, nobody has written the unit since.
// A unit that lost its mark without us (discarded, unmapped, merged by KSM)
// fails the capture with ErrorCode::discarded.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/latency_histogram.h"
#include "snap/staging.h"
#include "snap/unit_states.h"
#include "snap/vmm/guest_memory.h"
#include "snap/vmm/pagemap.h"
#include "snap/vmm/process.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

inline constexpr uint64_t huge_page_bytes = 2 << 20;

struct CapturedPiece {
  explicit CapturedPiece(const MemoryPiece& p) : piece(p), states(p) {}

  MemoryPiece piece;
  UnitStates states;
  // hugetlb files cannot be asked where their holes are; a falling number of
  // 512-byte blocks shows that one was made.
  std::atomic<uint64_t> expected_blocks = 0;

  // Private memory of a file: whether a unit was the process's own at the instant,
  // which it must be still when it is copied; else it is the file's. Written under
  // CaptureState::arming before the instant.
  std::vector<bool> own;

  // Private memory: where no page was when it was surveyed (arming.h).
  std::vector<RemoteRange> holes;

  struct Window {
    uint64_t first = 0, end = 0;  // units
  };
  // 2 MiB of the process's addresses, as units of 4 KiB; cut off at the ends of
  // the piece.
  Window window(uint64_t unit) const;
  // Whether the window around the unit is mapped as a huge page, as far as we
  // know. Written under CaptureState::arming before the instant.
  bool is_huge(uint64_t unit) const { return !huge_.empty() && huge_[window_index(unit)]; }
  // The same, after the instant, and nothing of it has been copied alone.
  bool is_whole(uint64_t unit) const;
  void note_huge(uint64_t first_unit, uint64_t count);

  uint64_t unit_pages() const { return piece.unit_bytes / page_size; }
  RemoteRange units(uint64_t first, uint64_t count) const {
    return {piece.range.start + first * piece.unit_bytes, count * piece.unit_bytes};
  }
  uint64_t page_of(uint64_t unit) const { return piece.first_page + unit * unit_pages(); }
  uint64_t unit_of(RemotePtr address) const { return (address - piece.range.start) / piece.unit_bytes; }
  // All units of which the run has a part.
  Window touched_by(RemoteRange run) const {
    return {unit_of(run.start), unit_of(run.end() + (piece.unit_bytes - 1))};
  }

 private:
  size_t window_index(uint64_t unit) const;

  std::vector<bool> huge_;  // a bit a window; empty: none is
};

struct UnitRun {
  CapturedPiece* piece = nullptr;
  uint64_t first = 0, count = 0;  // units

  uint64_t end() const { return first + count; }
};

struct CaptureCounters {
  std::atomic<uint64_t> copied_pages = 0;
  std::atomic<uint64_t> zero_pages = 0, duplicate_pages = 0, stored_pages = 0;  // compressed so far
  std::atomic<uint64_t> early_writes = 0;  // let through before the instant
  std::atomic<uint64_t> write_faults = 0;
  std::atomic<uint64_t> armed_pages = 0;  // what there is to copy; known after arm()
  std::atomic<uint64_t> split_huge_pages = 0, mended_huge_pages = 0;  // known at the end
  LatencyHistogram fault_latency;         // event read until the writer is woken
};

class CaptureState {
 public:
  CaptureState(const Process& target, PageMap map, Uffd fd, const GuestMemory& memory,
               std::unique_ptr<Staging> staging_memory);

  const Process& process;
  const PageMap pagemap;
  Uffd uffd;
  std::vector<std::unique_ptr<CapturedPiece>> pieces;  // by page number
  std::unique_ptr<Staging> staging;
  CaptureCounters counters;
  // Before the instant, and at it (arming.h). The mutex is held while events
  // are read and answered, so that none is read before the instant and answered
  // after it.
  std::mutex arming;
  bool armed = false;                // the instant has been
  std::vector<UnitRun> let_through;  // freed for early writers since they were last protected

  std::atomic<bool> early_writes_wait = false;  // a little, so that arming gains on them
  // Times that a writer was let go, or came to wait for what the sweep is copying and
  // will let go; from the instant on (turn.h).
  std::atomic<uint64_t> writers_woken = 0;

  // What was written shortly before the instant, and so is written again soon.
  // Arming's until the instant.
  std::vector<UnitRun> written_early;

  // Pages in the order in which writes to them waited for us: the working set.
  // The fault handler's until it ends; at most max_first_written.
  std::vector<uint64_t> first_written;
  static constexpr size_t max_first_written = 1 << 20;

  // The piece that holds an address of the process; null for none.
  CapturedPiece* find(RemotePtr address) const;

  // Huge pages of which a part was freed alone, by their start.
  void note_split(RemotePtr huge_page);
  std::set<RemotePtr> split_huge_pages() const;

  // Keeps the first error, and makes every thread of the capture stop.
  void fail(Error error);
  bool failed() const { return failed_.load(std::memory_order_acquire); }
  Status status() const;

  // Copies pages [first_page, +to.size()) of units that the caller has claimed.
  Status copy(const CapturedPiece& piece, uint64_t first_unit, uint64_t offset,
              std::span<std::byte> to) const;
  // After copying, before release(): whether `count` units were of the instant.
  // `data` is what was copied of them, or empty when it is no longer at hand.
  Status check(const CapturedPiece& piece, uint64_t first_unit, uint64_t count,
               std::span<const std::byte> data) const;
  // The error that a discarded page is.
  Error discarded(RemotePtr at) const;
  // Lets writers in again and wakes who waits.
  Status release(CapturedPiece& piece, uint64_t first_unit, uint64_t count);

 private:
  Status copy_private_of_file(const CapturedPiece& piece, uint64_t first_unit, uint64_t offset,
                              std::span<std::byte> to) const;
  Status read_memory(const CapturedPiece& piece, uint64_t in_piece, std::span<std::byte> to) const;
  Status read_file(const CapturedPiece& piece, uint64_t in_piece, std::span<std::byte> to) const;
  Result<std::vector<bool>> owned(const CapturedPiece& piece, uint64_t first_unit, uint64_t count) const;
  Result<std::vector<bool>> owned_as_before(const CapturedPiece& piece, uint64_t first_unit,
                                            uint64_t count) const;
  Status check_file(const CapturedPiece& piece, uint64_t first_unit,
                    std::span<const std::byte> data) const;

  const std::string file_name_;  // for errors; asking for it takes longer than reading a page
  mutable std::mutex split_mutex_;
  std::set<RemotePtr> split_;

  mutable std::mutex error_mutex_;
  std::optional<Error> error_;
  std::atomic<bool> failed_ = false;
};

}  // namespace vmsnap
