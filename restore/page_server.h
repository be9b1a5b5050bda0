// Gives one address space its memory from an image: each page when it is first
// touched, and the rest in the background.
//
// One thread, the one in serve(), makes every userfaultfd call, because order
// matters: a removal that was read must be marked before any later page is
// copied. It answers all waiting faults, then copies a small piece of the fill,
// then looks for faults again. It never touches the memory that it serves, so
// it cannot wait for itself. Decoding ahead for the fill is done by threads of
// a PageSource.
//
// A page is given whole (UFFDIO_COPY): a guest sees no page half filled. What
// cannot be read back is poisoned (UFFDIO_POISON: SIGBUS, for a guest a memory
// error); where the kernel has no poison the page stays missing and whoever
// touches it waits. It is never replaced by zeros.
//
// A page the guest gave back (REMOVE event) is zero from then on. Events are
// raised for madvise(2) on the mapping; a hole punched by fallocate(2) alone
// into shared memory raises none (userfaultfd(2)), so a VMM must use madvise.
//
// If the VMM dies, serve() returns ServeEnd::vm_gone.
//
// Sources: userfaultfd(2), ioctl_userfaultfd(2).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "formats/image_reader.h"
#include "formats/latency_histogram.h"
#include "restore/page_marks.h"
#include "restore/page_source.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

// The features that a userfaultfd for a restore must be made with.
inline constexpr uint64_t page_server_features =
    uffd_feature::missing_hugetlbfs | uffd_feature::missing_shmem | uffd_feature::event_remove;

enum class ServeEnd {
  filled,   // all is there and the ranges are no longer watched
  stopped,  // stop() was called; whoever touches a missing page waits
  vm_gone,
};

struct PageServerOptions {
  bool fill = true;              // load what nobody touches, too, from the start
  bool release = true;           // when all is there, unregister the ranges and return
  bool use_poison = true;        // false: as on a kernel without UFFDIO_POISON
  unsigned decoder_threads = 0;  // 0: by the number of CPUs, at most 4
  int pidfd = -1;                // of the VMM (borrowed); -1: its death is found by asking
  std::string vm = "the VM";     // for the log
};

struct LatencySummary {
  double p50 = 0, p99 = 0, max = 0;  // microseconds; 0 when nothing was measured
};

// Pages of 4 KiB. Any thread may take a snapshot of them.
struct PageServerCounters {
  uint64_t data_pages = 0;            // of the image
  uint64_t filled_by_fault = 0;       // data pages
  uint64_t filled_by_background = 0;  // data pages
  uint64_t found_filled = 0;          // data pages that were there before serve()
  uint64_t removed = 0;               // given back by the guest
  uint64_t poisoned = 0;
  uint64_t left_missing = 0;  // unreadable, and could not be poisoned
  uint64_t faults = 0;        // answered
  LatencySummary fault_us;    // from reading the event to the page being there

  uint64_t filled() const { return filled_by_fault + filled_by_background + found_filled; }
};

class PageServer {
 public:
  // Everything is borrowed and must outlive this. The ranges must be registered
  // for missing faults, must not overlap, and must lie within the image and the
  // marks. The uffd is made O_NONBLOCK.
  PageServer(const Uffd& uffd, const ImageReader& reader, PageMarks& marks,
             std::vector<ServedRange> ranges, PageServerOptions options);
  ~PageServer();
  PageServer(const PageServer&) = delete;
  PageServer& operator=(const PageServer&) = delete;

  // Serves in the calling thread until one of the ends, once. First wakes all
  // who wait in the ranges, so that faults a predecessor had read are raised
  // again. Errors: only what leaves pages unserved (the uffd fails); unreadable
  // pages are counted and logged.
  Result<ServeEnd> serve();

  // The two of them from any thread. serve() returns soon:
  void stop();
  // Begins to fill, if it was not to from the start. (A guest that is to run is
  // waited for by nobody when it runs first.)
  void begin_fill();

  PageServerCounters counters() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Fault {
    RemotePtr address;  // start of the unit
    size_t range;
    Clock::time_point seen;
  };
  enum class Answer { done, again };

  Result<ServeEnd> run();
  void wake_server() const;
  Status prepare();
  Status start_source();
  Result<bool> wait_for_work();  // false: the VMM is gone or stop() was called
  Result<size_t> read_events();
  void note_removals(const std::vector<UffdEvent>& events);
  void note_removed(RemotePtr start, uint64_t length);
  Status answer_faults();
  Result<Answer> answer(const Fault& fault);
  Result<Answer> give_zero(const ServedRange& range, RemotePtr at);
  Result<bool> read_unit(const ServedRange& range, uint64_t first_page);
  Result<Answer> give_up(const ServedRange& range, uint64_t first_page, const std::string& why);

  // The background fill (page_fill.cpp).
  struct Piece {
    DecodedExtent::State state;
    uint64_t pages;
  };
  Status fill(uint64_t budget);
  Result<uint64_t> fill_piece(uint64_t budget);
  Piece next_piece(uint64_t unit_pages, uint64_t budget) const;
  bool nothing_left() const;
  Status release_ranges();

  bool find_range(RemotePtr address, size_t* index) const;
  bool vm_is_gone() const;
  void count_filled(std::atomic<uint64_t>& counter, uint64_t pages);

  const Uffd& uffd_;
  const ImageReader& reader_;
  PageMarks& marks_;
  const std::vector<ServedRange> ranges_;
  const PageServerOptions options_;

  Fd called_;  // eventfd: one of the two flags was set
  std::atomic<bool> stop_ = false, fill_ = false;
  bool filled_ = false;
  std::unique_ptr<PageSource> source_;
  DecodedExtent* extent_ = nullptr;          // being copied by the fill
  uint64_t extent_done_ = 0;                 // pages of it
  std::vector<Fault> waiting_;               // read and not yet answered
  std::unordered_set<uint64_t> unreadable_;  // first pages of units already given up
  std::vector<RemoteRange> left_missing_;    // those that could not be poisoned
  std::vector<std::byte> buffer_;            // one unit
  std::vector<std::byte> zeros_;             // one huge unit, where zero pages must be copied
  Clock::time_point last_fault_;
  bool stalled_ = false;  // the last step got EAGAIN: do not spin
  bool passed_half_ = false;

  LatencyHistogram latency_;
  uint64_t data_pages_ = 0;
  std::atomic<uint64_t> filled_by_fault_ = 0, filled_by_background_ = 0, found_filled_ = 0;
  std::atomic<uint64_t> removed_ = 0, poisoned_ = 0, missing_ = 0, faults_ = 0;
};

}  // namespace vmsnap
