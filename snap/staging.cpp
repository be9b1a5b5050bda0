#include "snap/staging.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

namespace vmsnap {

std::span<std::byte> Chunk::add(uint64_t first_number, size_t pages) {
  const size_t before = numbers_.size();
  for (size_t i = 0; i < pages; ++i) numbers_.push_back(first_number + i);
  return {data_ + before * page_size, pages * page_size};
}

Result<std::unique_ptr<Staging>> Staging::create(uint64_t bytes) {
  constexpr size_t chunk_bytes = Chunk::capacity * page_size;
  const size_t count = std::max<size_t>(bytes / chunk_bytes, 8);
  std::unique_ptr<Staging> staging(new Staging);
  void* memory = ::mmap(nullptr, count * chunk_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return fail_errno(errno, "cannot allocate {} bytes", count * chunk_bytes);
  // Fewer page faults on the way of a waiting guest.
  ::madvise(memory, count * chunk_bytes, MADV_HUGEPAGE);
  staging->memory_ = static_cast<std::byte*>(memory);
  staging->memory_bytes_ = count * chunk_bytes;
  staging->chunks_.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Chunk& chunk = staging->chunks_[i];
    chunk.data_ = staging->memory_ + i * chunk_bytes;
    chunk.numbers_.reserve(Chunk::capacity);
    staging->empty_.push_back(&chunk);
  }
  return staging;
}

Staging::~Staging() {
  if (memory_) ::munmap(memory_, memory_bytes_);
}

Chunk* Staging::take_empty(For purpose, std::chrono::milliseconds limit) {
  const size_t keep = purpose == For::sweep ? kept_for_faults : 0;
  std::unique_lock lock(mutex_);
  empty_changed_.wait_for(lock, limit, [&] { return aborted_ || empty_.size() > keep; });
  if (aborted_ || empty_.size() <= keep) return nullptr;
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
  // All: a waiting sweep may not take the chunk that a waiting fault may.
  empty_changed_.notify_all();
}

void Staging::hand_on(Chunk* full) {
  {
    std::lock_guard lock(mutex_);
    full_.push_back(full);
  }
  full_changed_.notify_one();
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
