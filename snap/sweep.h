// The background sweep: copies what no write fault has brought in yet. First
// what was written shortly before the instant, because it will be written
// again; then all, in address order.
//
// Several threads share one sweep; each calls next() with a chunk of its own.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>

#include "formats/error.h"
#include "snap/capture_state.h"
#include "snap/turn.h"

namespace vmsnap {

class Sweep {
 public:
  // Made after the instant. The state must outlive it.
  explicit Sweep(CaptureState& state) : state_(state) {}

  // Takes the next piece of work and copies what is armed of it into `chunk`,
  // which is empty, and may stay so. False when there is no more work; others
  // may then still be at theirs. A hugetlb page that is larger than a chunk is
  // copied as a whole before its writers go on: `full` is called to empty the
  // chunk in between. `turn` is the calling thread's.
  Result<bool> next(Chunk& chunk, const std::function<Status()>& full, Turn& turn);

  // Waits until nothing is left to take and nobody is copying, up to `limit`: says
  // whether that is so.
  bool wait_finished(std::chrono::milliseconds limit);

 private:
  struct Work {
    CapturedPiece* piece = nullptr;
    uint64_t first = 0, end = 0;  // units
  };
  bool finished() const { return exhausted_ && copying_ == 0; }
  bool take(Work& work);
  bool take_early(Work& work);
  Status copy_pages(const Work& work, Chunk& chunk, Turn& turn);
  Status copy_large_unit(const Work& work, Chunk& chunk, const std::function<Status()>& full);

  CaptureState& state_;
  std::mutex mutex_;
  std::condition_variable finished_;
  size_t early_ = 0, piece_ = 0;  // index of the next run, of the piece
  uint64_t unit_ = 0;             // in that run or piece
  unsigned copying_ = 0;
  bool exhausted_ = false;
  std::atomic<uint64_t> writes_seen_ = 0;  // CaptureCounters::write_faults, as of the last window
};

}  // namespace vmsnap
