#include "snap/pace.h"

#include <algorithm>

namespace vmsnap {

void Pace::used(uint64_t bytes, Clock::time_point now) {
  if (rate_ == 0) return;
  constexpr std::chrono::seconds made_up{1};
  const std::chrono::duration<double> cost(static_cast<double>(bytes) / static_cast<double>(rate_));
  std::lock_guard lock(mutex_);
  free_at_ = std::max(free_at_, now - made_up) + std::chrono::duration_cast<Clock::duration>(cost);
}

Pace::Clock::duration Pace::wait(Clock::time_point now) const {
  if (rate_ == 0) return {};
  std::lock_guard lock(mutex_);
  return std::max(free_at_ - now, Clock::duration{});
}

}  // namespace vmsnap
