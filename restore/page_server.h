// Gives one address space its memory from an image: each page when it is first
// touched, and the rest in the background.
//
// Faults are answered by a few threads, so that many are at the same time, and
// a page that takes long (a slow disk) holds up nobody but who waits for it.
// Order matters all the same: a removal that was read must be marked before any
// later page is copied. So events are read, and what they remove is marked, by
// one thread while no page is copied; and a page is copied only after another
// look at its mark. It is decoded before that.
//
// The thread that reads events copies the rest in pieces, small ones while the
// guest faults, and looks for events after each. The thread in serve() watches.
// Decoding ahead for it is done by threads of a PageSource. None of
// them touches the memory that is served, so none waits for itself.
//
// A page is given whole (UFFDIO_COPY): a guest sees no page half filled. What
// cannot be read back is poisoned (UFFDIO_POISON: SIGBUS, for a guest a memory
// error); where the kernel has no poison the page stays missing and whoever
// touches it waits. It is never replaced by zeros. What only cannot be read now
// (no descriptor is free, a permission is missing) is neither: whoever touches it
// waits while it is tried again, and so does the end of the fill.
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
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <thread>
#include <unordered_set>
#include <vector>

#include "formats/image_reader.h"
#include "formats/latency_histogram.h"
#include "restore/episode.h"
#include "restore/page_marks.h"
#include "restore/page_source.h"
#include "restore/put_off.h"
#include "restore/working_set_recorder.h"
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
  // What is loaded that nobody touched. Only with `all` does serve() ever
  // return ServeEnd::filled.
  Prefetch prefetch = Prefetch::all;
  bool prefetch_at_once = true;            // false: from begin_fill() on
  bool release = true;                     // when all is there, unregister the ranges and return
  bool use_poison = true;                  // false: as on a kernel without UFFDIO_POISON
  bool write_protect = false;              // pages arrive with the mark, where it is registered for
  unsigned decoder_threads = 0;            // 0: by the number of CPUs, at most 4
  unsigned fault_threads = 4;              // one slow page fewer holds up nobody else
  WorkingSetRecorder* recorder = nullptr;  // (borrowed) told of data pages that faulted
  int pidfd = -1;             // of the VMM (borrowed); -1: its death is found by asking
  std::string vm = "the VM";  // for the log
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

  // Serves until one of the ends, once, and blocks until then. First wakes all
  // who wait in the ranges, so that faults a predecessor had read are raised
  // again. Errors: only what leaves pages unserved (the uffd fails); unreadable
  // pages are counted and logged.
  Result<ServeEnd> serve();

  // The two of them from any thread. serve() returns soon:
  void stop();
  // Begins to load ahead, as far as `prefetch` says, if it was not to from the
  // start. (A guest that is to run is waited for by nobody when it runs first.)
  void begin_fill();

  PageServerCounters counters() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Fault {
    RemotePtr address;  // start of the unit
    size_t range;
    bool write_protected;  // the page is there, with the mark
    Clock::time_point seen;
  };
  // again: the kernel wants events read first; later: it cannot be read now.
  enum class Answer { done, again, later };

  Result<ServeEnd> run();
  Status prepare();
  static void wake(const Fd& eventfd);
  bool find_range(RemotePtr address, size_t* index) const;
  bool vm_is_gone() const;

  // Events (page_events.cpp).
  void start_answerers();
  void end_answerers();
  void run_answerer();
  Status answer_until_halted();
  void begin_answer(uint64_t turn);
  bool end_answer(uint64_t& turn);
  Result<ServeEnd> watch_until_end();
  bool watch_reader();  // false: it may be left alone until it asks
  std::optional<Fault> wait_for_turn(std::optional<uint64_t>& turn);
  std::optional<Fault> take_queued();
  void queue_faults(std::span<const Fault> faults);
  void postpone(const Fault& fault);
  Result<std::optional<Fault>> read_fault();
  void say_delay(const Error& why);
  void say(std::string line);
  void tell();
  std::optional<Fault> fault_of(const UffdEvent& event);
  void note_removals(const std::vector<UffdEvent>& events);

  // Answers (page_answer.cpp).
  Status settle(const Fault& fault, std::span<std::byte> buffer);
  Result<Answer> answer(const Fault& fault, std::span<std::byte> buffer);
  Result<Answer> lift_protection(const Fault& fault);
  Result<bool> read_unit(const ServedRange& range, uint64_t first_page,
                         std::span<std::byte> buffer) const;
  Result<Uffd::Copied> put(size_t range, RemotePtr at, std::span<const std::byte> bytes);
  Result<Answer> give_zero(size_t range, RemotePtr at);
  Result<Answer> give_up(const ServedRange& range, uint64_t first_page, const std::string& why);
  Result<Answer> poison(const ServedRange& range, uint64_t first_page, bool* poisoned);
  void count_filled(std::atomic<uint64_t>& counter, uint64_t pages);

  // The background fill (page_fill.cpp).
  struct Piece {
    DecodedExtent::State state;
    uint64_t pages;
  };
  Status fill_some();
  bool wants_fill() const;
  int ms_to_fill() const;
  Status wait_for_work();
  bool start_source();
  Status fill(uint64_t budget);
  Result<uint64_t> fill_piece(uint64_t budget);
  Piece next_piece(uint64_t unit_pages, uint64_t budget) const;
  bool nothing_left() const;
  Status release_ranges();

  const Uffd& uffd_;
  const ImageReader& reader_;
  PageMarks& marks_;
  const std::vector<ServedRange> ranges_;
  const PageServerOptions options_;

  Fd called_;  // eventfd: something changed, for the thread in serve()
  Fd begun_;   // eventfd: begin_fill() was called, for the reader
  Fd halt_;    // eventfd: the answerers are to end
  std::atomic<bool> released_ = false;  // all is there, and the ranges are no longer watched
  std::atomic<bool> stop_ = false, fill_ = false, halted_ = false;

  // Held alone to read events and mark what they tell, shared to look at a mark
  // and copy.
  std::shared_mutex order_;
  std::vector<std::byte> zeros_;  // one unit, where zero pages must be copied
  std::vector<std::thread> answerers_;
  std::atomic<uint64_t> turn_ = 0;       // see begin_answer()
  std::atomic<bool> unwatched_ = false;  // the thread in serve() is to be woken to watch
  std::mutex queue_mutex_;               // of the next five
  std::condition_variable queue_changed_;
  std::deque<Fault> queue_;                // read, and nobody settles them yet
  std::optional<uint64_t> free_turn_ = 0;  // the reader's role is free, and turn_ is this
  unsigned idle_answerers_ = 0;
  std::optional<Error> failed_;                   // of an answerer
  std::atomic<size_t> queued_ = 0;                // queue_.size()
  std::mutex unreadable_mutex_;                   // of the next two
  std::unordered_set<uint64_t> unreadable_;       // first pages of units already given up
  std::vector<RemoteRange> left_missing_;         // those that could not be poisoned
  std::unique_ptr<std::atomic<bool>[]> protect_;  // of each range: arrives write-protected

  // What is to be logged. By the thread in serve(): a terminal that is stopped (Ctrl-S),
  // or a pipe that is full, must not hold up the guest.
  std::mutex said_mutex_;
  std::vector<std::string> said_;

  // Of the thread in serve().
  uint64_t watched_turn_ = 0;
  Clock::time_point watched_since_;

  // Of the reader.
  Clock::time_point last_fault_;
  bool filled_ = false;
  std::unique_ptr<PageSource> source_;
  DecodedExtent* extent_ = nullptr;  // being copied by the fill
  uint64_t extent_done_ = 0;         // pages of it
  bool stalled_ = false;             // the last step got EAGAIN: do not spin
  bool skipped_ = false;             // pages of this round could not be read now
  Clock::time_point fill_again_at_;  // not before

  PutOff<Fault> put_off_;  // their pages cannot be read now
  Episode delay_;
  LatencyHistogram latency_;
  uint64_t data_pages_ = 0;
  std::atomic<bool> passed_half_ = false;
  std::atomic<uint64_t> filled_by_fault_ = 0, filled_by_background_ = 0, found_filled_ = 0;
  std::atomic<uint64_t> removed_ = 0, poisoned_ = 0, missing_ = 0, faults_ = 0;
};

}  // namespace vmsnap
