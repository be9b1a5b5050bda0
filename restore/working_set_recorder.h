// The order in which pages of an image were first asked for.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace vmsnap {

// Any thread may call any of it.
class WorkingSetRecorder {
 public:
  // Of an image with so many pages; remembers `limit` of them, the first ones.
  WorkingSetRecorder(uint64_t image_pages, uint64_t limit) : seen_(image_pages), limit_(limit) {}

  // Image page; again, or beyond the end: ignored.
  void add(uint64_t page) {
    std::lock_guard lock(mutex_);
    if (page >= seen_.size() || seen_[page] || pages_.size() >= limit_) return;
    seen_[page] = true;
    pages_.push_back(page);
  }

  std::vector<uint64_t> pages() const {
    std::lock_guard lock(mutex_);
    return pages_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<bool> seen_;
  std::vector<uint64_t> pages_;
  const uint64_t limit_;
};

}  // namespace vmsnap
