// One worker's turn on its processor, which it ends when somebody waits for it.
//
// The kernel lets a thread that wakes up wait until the turn of the one that runs
// is over, which it sees at its next tick: up to 4 ms. A worker looks more often. Of
// the calling thread alone; it blocks for as long as others run.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

#include "snap/capture_state.h"
#include "snap/fault_handler.h"

namespace vmsnap {

class Turn {
 public:
  Turn(const CaptureState& state, FaultHandler& faults);

  // To be called every few microseconds of work; looks some twenty times a millisecond,
  // and has the handler follow the writer (fault_handler.h): a worker that does it takes
  // no time from either.
  // Yields if a writer has been let go since it looked last, or if a write waits to be
  // answered: either may have this processor next (sched_yield(2)).
  void end_if_wanted();

 private:
  bool is_wanted();

  const CaptureState& state_;
  FaultHandler& faults_;
  std::optional<UffdQueue> queue_;  // none if /proc does not show it
  uint64_t woken_seen_ = 0;
  std::chrono::steady_clock::time_point looked_;
};

}  // namespace vmsnap
