// How fast an image may be written: `--bandwidth`.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>

namespace vmsnap {

// Any thread. Counts bytes from its making on and says how long to wait, so
// that on the average no more than the given rate is used. Up to a second's
// worth that was not used may be made up for.
class Pace {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Pace(uint64_t bytes_per_second) : rate_(bytes_per_second) {}  // 0: no limit

  void used(uint64_t bytes, Clock::time_point now = Clock::now());
  // How long whoever wants to use more should wait first.
  Clock::duration wait(Clock::time_point now = Clock::now()) const;

 private:
  const uint64_t rate_;
  mutable std::mutex mutex_;
  Clock::time_point free_at_;  // when all that was used so far is within the rate
};

}  // namespace vmsnap
