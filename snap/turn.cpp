#include "snap/turn.h"

#include <sched.h>

#include <utility>

namespace vmsnap {

namespace {

// Who yields gives up a turn: more often, and a host that is busy leaves a worker so little
// of its processors that writers come to wait for room in the staging.
constexpr std::chrono::microseconds between_looks{50};

}  // namespace

Turn::Turn(const CaptureState& state, FaultHandler& faults) : state_(state), faults_(faults) {
  if (auto queue = UffdQueue::open(state.uffd)) queue_ = *std::move(queue);
}

void Turn::end_if_wanted() {
  if (is_wanted()) ::sched_yield();
}

bool Turn::is_wanted() {
  const auto now = std::chrono::steady_clock::now();
  if (now - looked_ < between_looks) return false;
  looked_ = now;
  faults_.follow_writer();
  const uint64_t woken = state_.writers_woken;
  return woken != std::exchange(woken_seen_, woken) || (queue_ && queue_->has_events());
}

}  // namespace vmsnap
