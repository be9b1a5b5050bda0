// Durations counted in buckets about 6 % wide, for percentiles.
//
// add() from any number of threads; reading meanwhile gives a recent state.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>

namespace vmsnap {

class LatencyHistogram {
 public:
  void add(std::chrono::nanoseconds duration) {
    const uint64_t ns = duration.count() > 0 ? static_cast<uint64_t>(duration.count()) : 0;
    buckets_[bucket_of(ns)].fetch_add(1, std::memory_order_relaxed);
    count_.fetch_add(1, std::memory_order_relaxed);
    total_ns_.fetch_add(ns, std::memory_order_relaxed);
    uint64_t seen = max_ns_.load(std::memory_order_relaxed);
    while (ns > seen && !max_ns_.compare_exchange_weak(seen, ns, std::memory_order_relaxed)) {
    }
  }

  uint64_t count() const { return count_.load(std::memory_order_relaxed); }
  double total_ms() const {
    return static_cast<double>(total_ns_.load(std::memory_order_relaxed)) / 1e6;
  }
  double max_us() const {
    return static_cast<double>(max_ns_.load(std::memory_order_relaxed)) / 1000;
  }

  // The upper end of the bucket in which the given share (0..1) of all
  // durations is reached, in microseconds; 0 when there are none.
  double percentile_us(double share) const {
    const uint64_t total = count();
    uint64_t passed = 0;
    for (size_t i = 0; i < buckets_.size(); ++i) {
      passed += buckets_[i].load(std::memory_order_relaxed);
      if (total > 0 && static_cast<double>(passed) >= share * static_cast<double>(total)) {
        return std::min(static_cast<double>(upper_end(i)) / 1000, max_us());
      }
    }
    return max_us();
  }

 private:
  // Sixteen steps for each power of two.
  static constexpr size_t steps = 16;
  static size_t bucket_of(uint64_t ns) {
    if (ns < steps) return ns;
    const int exponent = std::bit_width(ns) - 1;
    const uint64_t step = (ns >> (exponent - 4)) & (steps - 1);
    return static_cast<size_t>(exponent - 3) * steps + step;
  }
  static uint64_t upper_end(size_t bucket) {
    if (bucket < steps) return bucket;
    const uint64_t exponent = bucket / steps + 3;
    return ((steps + bucket % steps + 1) << (exponent - 4)) - 1;
  }

  std::array<std::atomic<uint64_t>, 62 * steps> buckets_ = {};
  std::atomic<uint64_t> count_ = 0;
  std::atomic<uint64_t> max_ns_ = 0;
  std::atomic<uint64_t> total_ns_ = 0;
};

}  // namespace vmsnap
