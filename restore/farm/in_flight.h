// Pages that some thread is reading at the moment, and who waits for them.
//
// Two clones that touch the same page at once must not read it twice, and the
// second must not keep a thread waiting: its fault is left with the first.
// Any thread may call anything.
#pragma once

#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace vmsnap {

template <class Waiter>
class InFlight {
 public:
  // True: nobody reads the page, the caller does now and must call end().
  // False: `waiter` was left with who reads it.
  bool begin(uint64_t page, const Waiter& waiter) {
    std::lock_guard lock(mutex_);
    const auto [at, first] = pages_.try_emplace(page);
    if (!first) at->second.push_back(waiter);
    return first;
  }

  // The same without anybody to wait: false just says that somebody is at it.
  bool begin(uint64_t page) {
    std::lock_guard lock(mutex_);
    return pages_.try_emplace(page).second;
  }

  // Those who came meanwhile; they are the caller's now.
  std::vector<Waiter> end(uint64_t page) {
    std::lock_guard lock(mutex_);
    const auto at = pages_.find(page);
    std::vector<Waiter> waiters = std::move(at->second);
    pages_.erase(at);
    return waiters;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<uint64_t, std::vector<Waiter>> pages_;
};

}  // namespace vmsnap
