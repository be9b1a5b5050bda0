#include "snap/staging.h"

#include <sched.h>

#include <algorithm>

namespace vmsnap {

std::span<std::byte> Chunk::add(uint64_t first_number, size_t pages) {
  const size_t before = numbers_.size();
  for (size_t i = 0; i < pages; ++i) numbers_.push_back(first_number + i);
  return {&data_[before * page_size], pages * page_size};
}

Result<Chunk> Chunk::create() {
  Chunk chunk;
  chunk.data_ = VMSNAP_TRY(SparseArray<std::byte>::create(capacity * page_size, Touched::all_over));
  chunk.numbers_.reserve(capacity);
  return chunk;
}

void Chunk::populate() {
  for (size_t page = 0; page < capacity; ++page) data_[page * page_size] = {};
}

Result<std::unique_ptr<Staging>> Staging::create(uint64_t bytes) {
  const size_t count = std::max<size_t>(bytes / (Chunk::capacity * page_size), 4);
  std::unique_ptr<Staging> staging(new Staging);
  staging->chunks_.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    staging->chunks_.push_back(VMSNAP_TRY(Chunk::create()));
    staging->empty_.push_back(&staging->chunks_.back());
  }
  return staging;
}

void Staging::populate(const std::atomic<bool>& enough) {
  std::lock_guard lock(mutex_);
  // From the back: the last is taken first.
  for (size_t left = empty_.size(); left > reserve() && !enough; --left) {
    empty_[left - 1]->populate();
    ::sched_yield();  // a writer may wait for this processor
  }
}

Chunk* Staging::take_empty(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  empty_changed_.wait_for(lock, limit, [&] { return aborted_ || !empty_.empty(); });
  if (aborted_ || empty_.empty()) return nullptr;
  Chunk* chunk = empty_.back();
  empty_.pop_back();
  return chunk;
}

void Staging::give_back(Chunk* chunk) {
  chunk->clear();
  {
    std::lock_guard lock(mutex_);
    empty_.push_back(chunk);
  }
  empty_changed_.notify_one();
}

bool Staging::has_plenty() {
  std::lock_guard lock(mutex_);
  return empty_.size() > reserve();
}

void Staging::hand_on(Chunk* full) {
  {
    std::lock_guard lock(mutex_);
    full_.push_back(full);
  }
  full_changed_.notify_one();
}

Chunk* Staging::try_take_full() {
  std::lock_guard lock(mutex_);
  if (aborted_ || full_.empty()) return nullptr;
  Chunk* chunk = full_.front();
  full_.pop_front();
  return chunk;
}

Chunk* Staging::take_full() {
  std::unique_lock lock(mutex_);
  full_changed_.wait(lock, [&] { return aborted_ || closed_ || !full_.empty(); });
  if (aborted_ || full_.empty()) return nullptr;
  Chunk* chunk = full_.front();
  full_.pop_front();
  return chunk;
}

void Staging::close() {
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
  }
  full_changed_.notify_all();
}

void Staging::abort() {
  {
    std::lock_guard lock(mutex_);
    aborted_ = true;
  }
  full_changed_.notify_all();
  empty_changed_.notify_all();
}

}  // namespace vmsnap
