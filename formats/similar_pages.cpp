#include "formats/similar_pages.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

#include "formats/page_entry.h"

namespace vmsnap {

namespace {

constexpr size_t window = 32;

uint64_t hash_of(const std::byte* bytes) {
  constexpr uint64_t odd = 0x9e3779b97f4a7c15;
  uint64_t value = 0;
  for (size_t at = 0; at < window; at += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, bytes + at, sizeof word);
    value = (value ^ word) * odd;
    value ^= value >> 29;
  }
  return value;
}

uint64_t load(uint64_t& value) {
  return std::atomic_ref(value).load(std::memory_order_relaxed);
}

void store(uint64_t& value, uint64_t to) {
  std::atomic_ref(value).store(to, std::memory_order_relaxed);
}

}  // namespace

Sketch::Sketch(std::span<const std::byte, page_size> page) {
  for (size_t at = 0; at + window <= page_size; ++at) {
    uint32_t first;
    std::memcpy(&first, &page[at], sizeof first);
    // One position in 32; runs of zeros say nothing about a page.
    if (first != 0 && first * 2654435761U >> 27 == 0) add(hash_of(&page[at]));
  }
}

void Sketch::add(uint64_t hash) {
  if (count_ == max_hashes && hash >= hashes_.back()) return;
  const auto end = hashes_.begin() + static_cast<ptrdiff_t>(count_);
  const auto place = std::lower_bound(hashes_.begin(), end, hash);
  if (place != end && *place == hash) return;
  if (count_ < max_hashes) ++count_;
  std::move_backward(place, hashes_.begin() + static_cast<ptrdiff_t>(count_) - 1,
                     hashes_.begin() + static_cast<ptrdiff_t>(count_));
  *place = hash;
}

Result<std::unique_ptr<SimilarPages>> SimilarPages::create(size_t slots) {
  std::unique_ptr<SimilarPages> pages(new SimilarPages);
  pages->slots_ = VMSNAP_TRY(SparseArray<Slot>::create(std::bit_ceil(std::max<size_t>(slots, 1))));
  return pages;
}

uint64_t SimilarPages::entry_of(uint64_t hash, uint64_t pack) const {
  Slot& slot = slot_of(hash);
  const uint64_t entry = load(slot.entry);
  return load(slot.hash) == hash && PageEntry::from_bits(entry).pack == pack ? entry : 0;
}

void SimilarPages::find(const Sketch& sketch, uint64_t pack, std::vector<uint64_t>& found) const {
  for (const uint64_t hash : sketch.hashes()) {
    if (const uint64_t entry = entry_of(hash, pack); entry != 0) found.push_back(entry);
  }
}

void SimilarPages::add(const Sketch& sketch, uint64_t entry) {
  const uint64_t pack = PageEntry::from_bits(entry).pack;
  for (const uint64_t hash : sketch.hashes()) {
    // The first page with a hash keeps it: the more often one is the base of
    // others, the sooner it is in the page cache.
    if (entry_of(hash, pack) != 0) continue;
    Slot& slot = slot_of(hash);
    store(slot.hash, hash);
    store(slot.entry, entry);
  }
}

uint64_t most_frequent(std::vector<uint64_t>& values) {
  std::ranges::sort(values);
  uint64_t best = 0;
  ptrdiff_t most = 0;
  for (auto from = values.begin(); from != values.end();) {
    const auto to = std::upper_bound(from, values.end(), *from);
    if (to - from > most) {
      most = to - from;
      best = *from;
    }
    from = to;
  }
  return best;
}

}  // namespace vmsnap
