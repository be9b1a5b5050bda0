// The memory between copying and compressing: chunks of pages.
//
// Whoever sweeps compresses what it has copied itself, from a chunk of its own.
// What is copied for a writer that waits goes through the staging, a fixed
// number of chunks: the fault handler takes an empty one, fills it with pages
// and hands it on; whoever compresses takes a full one and gives it back empty.
// When none is empty, faults wait: memory of ours never grows.
#pragma once

#include <atomic>
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
#include "formats/sparse_array.h"

namespace vmsnap {

class Chunk {
 public:
  static constexpr size_t capacity = 512;  // pages: 2 MiB, one huge page

  // Not yet backed by memory: that comes as it is filled, in huge pages if the
  // kernel has some, because a writer that waits would wait for 512 small ones too.
  static Result<Chunk> create();
  // Takes all of the memory now.
  void populate();

  size_t size() const { return numbers_.size(); }
  size_t free() const { return capacity - numbers_.size(); }
  std::span<const uint64_t> numbers() const { return numbers_; }
  std::span<const std::byte> data() const { return {&data_[0], numbers_.size() * page_size}; }

  // Room for `pages` more pages, numbered from `first_number`; they count as
  // soon as they are added, so the bytes must be filled in before the chunk is
  // handed on. `pages` is at most free().
  std::span<std::byte> add(uint64_t first_number, size_t pages);
  void clear() { numbers_.clear(); }

 private:
  Chunk() = default;

  SparseArray<std::byte> data_;
  std::vector<uint64_t> numbers_;
};

class Staging {
 public:
  // `bytes` of staging, at least 8 MiB.
  static Result<std::unique_ptr<Staging>> create(uint64_t bytes);

  // Takes the memory of what plenty is, so that no writer waits for the kernel to find
  // it: that takes longer than to copy a huge page. Until `enough` says so, which may be
  // set meanwhile. Before any chunk is taken.
  void populate(const std::atomic<bool>& enough);

  // An empty chunk; waits for one up to `limit`. Null after abort() or when the
  // time is over.
  Chunk* take_empty(std::chrono::milliseconds limit);
  void give_back(Chunk* chunk);
  // Whether more than a quarter is empty.
  bool has_plenty();

  void hand_on(Chunk* full);
  // A full chunk, null if there is none at the moment.
  Chunk* try_take_full();
  // The same, but waits; null when closed and nothing is left.
  Chunk* take_full();

  // No chunk will be handed on any more: take_full() ends once drained.
  void close();
  // Forgets what is full and makes all waiting calls return null.
  void abort();

 private:
  Staging() = default;
  // So many are kept back when there is plenty.
  size_t reserve() const { return chunks_.size() / 4; }

  std::vector<Chunk> chunks_;

  std::mutex mutex_;
  std::condition_variable empty_changed_, full_changed_;
  std::vector<Chunk*> empty_;
  std::deque<Chunk*> full_;
  bool closed_ = false, aborted_ = false;
};

}  // namespace vmsnap
