// Answers the userfaultfd. Before the instant it lets writers through and notes
// where; from then on it copies the page that a writer waits for, and then lets
// the writer go on.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <optional>

#include "formats/file.h"
#include "snap/capture_state.h"
#include "snap/zero_memory.h"

namespace vmsnap {

class FaultHandler {
  using Clock = std::chrono::steady_clock;

 public:
  // A guest that waits longer than `stall_limit` for room in the staging
  // memory (a disk that hangs) makes the capture fail. `heartbeat` is called
  // several times a second from the thread in run().
  // `keep_huge`: all of a huge page is copied when one write to it waits, as
  // long as there is room; else a few pages, which splits it.
  FaultHandler(CaptureState& state, bool keep_huge, std::chrono::milliseconds stall_limit,
               std::function<void()> heartbeat);
  ~FaultHandler();

  Status prepare();
  // Until request_stop() and nothing is left to answer, or the capture fails.
  // In a thread of its own; errors go to state.fail().
  void run();
  void request_stop();

  // Lets run() go where the last writer runs, if nobody has looked for a while. Of any
  // other threads, as often as they like; then it reads a file in /proc.
  void follow_writer();

  // Answers what waits now, and returns how many events that were; from the
  // instant on one at most. Of run(), or of one thread instead of it; waits for the
  // disk if the staging is full.
  Result<size_t> answer_events();

 private:
  enum class Until { instant, stopped };
  Status answer_by_poll(Until end);
  Status answer_by_read();
  Status answer_the_rest();
  Status look_around();
  Status handle(const UffdEvent& event);
  Status let_through(CapturedPiece& piece, uint64_t unit);
  Status handle_write(CapturedPiece& piece, uint64_t unit);
  Status handle_missing(CapturedPiece& piece, uint64_t unit);
  bool is_near_recent(uint64_t page);
  CapturedPiece::Window around(const CapturedPiece& piece, uint64_t unit);
  Status copy_pages(CapturedPiece& piece, uint64_t unit);
  Status copy_large_unit(CapturedPiece& piece, uint64_t unit);
  Result<Chunk*> chunk_with_room(size_t pages);
  tl::unexpected<Error> stalled() const;
  Status check_sweeps_wait();
  void flush();
  bool has_staged() const;
  void hand_on_staged();

  // What comes next is dealt with in the same go: ever more, while writes come in
  // the order of addresses.
  class Ahead {
   public:
    // How many from `page` on, at most `limit`.
    uint64_t at(uint64_t page, uint64_t limit);
    // It were more: all before `page`.
    void reached(uint64_t page) { next_ = page; }

   private:
    uint64_t next_ = 0, count_ = 1;
  };

  CaptureState& state_;
  const bool keep_huge_;
  const std::chrono::milliseconds stall_limit_;
  const int idle_ms_;  // between signs of life
  std::function<void()> heartbeat_;
  Fd stop_;  // eventfd
  std::atomic<bool> stopping_ = false;
  std::atomic<pid_t> thread_ = 0;     // of run()
  std::atomic<int> processor_ = 0;    // where that was at the last event
  std::atomic<pid_t> last_writer_ = 0;  // 0: none since follow_writer() looked
  std::atomic<Clock::duration> next_look_{};  // of follow_writer(), since the clock's epoch
  bool at_instant_ = false;       // the instant has been, as of the last events
  // A unit that the sweep had claimed when a writer came, null if there is none,
  // and since when the writer waits.
  struct SweepsWait {
    CapturedPiece* piece = nullptr;
    uint64_t unit = 0;
    Clock::time_point since = {};
  };

  // Under CaptureState::arming until the instant, then of run() alone:
  SweepsWait sweeps_;
  Chunk* chunk_ = nullptr;        // being filled
  Ahead early_, ahead_;
  // Regions of region_pages in which writes have waited lately, each in the place that
  // its number gives it, where the next takes its place.
  std::array<uint64_t, 64> recent_regions_;
  std::optional<ZeroMemory> zeros_;  // one hugetlb page, of the largest unit; made when first needed
};

}  // namespace vmsnap
