// The memory between copying and compressing: a fixed number of chunks.
//
// Whoever copies takes an empty chunk, fills it with pages and hands it on;
// whoever compresses takes a full one and gives it back empty. When none is
// empty, copying waits, and with it the guest's writes: memory of ours never
// grows. The last few empty chunks are kept for write faults, so that the
// sweep cannot starve them.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "formats/error.h"
#include "formats/image_info.h"

namespace vmsnap {

class Chunk {
 public:
  static constexpr size_t capacity = 512;  // pages: 2 MiB, one huge page

  size_t size() const { return numbers_.size(); }
  size_t free() const { return capacity - numbers_.size(); }
  std::span<const uint64_t> numbers() const { return numbers_; }
  std::span<const std::byte> data() const { return {data_, numbers_.size() * page_size}; }

  // Room for `pages` more pages, numbered from `first_number`; they count as
  // soon as they are added, so the bytes must be filled in before the chunk is
  // handed on. `pages` is at most free().
  std::span<std::byte> add(uint64_t first_number, size_t pages);
  void clear() { numbers_.clear(); }

 private:
  friend class Staging;
  std::byte* data_ = nullptr;  // owned by Staging
  std::vector<uint64_t> numbers_;
};

class Staging {
 public:
  enum class For { sweep, fault };

  // `bytes` of staging, at least 16 MiB; allocated here, once.
  static Result<std::unique_ptr<Staging>> create(uint64_t bytes);
  ~Staging();

  // An empty chunk; waits for one up to `limit`. Null after close() or when
  // the time is over.
  Chunk* take_empty(For purpose, std::chrono::milliseconds limit);
  void give_back(Chunk* chunk);

  void hand_on(Chunk* full);
  // A full chunk; waits. Null when closed and nothing is left.
  Chunk* take_full();

  // No chunk will be handed on any more: take_full() ends once drained.
  void close();
  // Forgets what is full and makes all waiting calls return null.
  void abort();

 private:
  Staging() = default;
  static constexpr size_t kept_for_faults = 2;

  std::byte* memory_ = nullptr;
  size_t memory_bytes_ = 0;
  std::vector<Chunk> chunks_;

  std::mutex mutex_;
  std::condition_variable empty_changed_, full_changed_;
  std::vector<Chunk*> empty_;
  std::deque<Chunk*> full_;
  bool closed_ = false, aborted_ = false;
};

}  // namespace vmsnap
