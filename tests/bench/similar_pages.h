// Finds, for a page, one seen before that has much in common with it, at whatever
// offset: memory holds a program's code in its file, in archives and in objects,
// and heaps hold the same text and structures again and again.
//
// A page's sketch is the least hashes of the 32-byte strings in it that begin
// where the bytes themselves say so. Two pages share a part of their sketches as
// large as the part of the strings that they share (Broder, "On the resemblance
// and containment of documents", 1997).
//
// For one thread. A sketch takes about 150 bytes of memory: fit for measuring.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "formats/image_info.h"

namespace vmsnap {

class SimilarPages {
 public:
  using Sketch = std::vector<uint64_t>;
  static constexpr size_t sketch_hashes = 8;

  static Sketch sketch(std::span<const std::byte, page_size> page) {
    Sketch found;
    for (size_t at = 0; at + window <= page_size; ++at) {
      uint32_t first;
      std::memcpy(&first, &page[at], sizeof first);
      // One position in 32; runs of zeros say nothing about a page.
      if (first != 0 && first * 2654435761U >> 27 == 0) found.push_back(hash(&page[at]));
    }
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    if (found.size() > sketch_hashes) found.resize(sketch_hashes);
    return found;
  }

  // The added page that shares most of the sketch; the first of several.
  std::optional<uint32_t> find(const Sketch& sketch) const {
    std::vector<uint32_t> sharing;
    for (const uint64_t value : sketch) {
      if (const auto found = first_with_.find(value); found != first_with_.end()) {
        sharing.push_back(found->second);
      }
    }
    std::sort(sharing.begin(), sharing.end());
    std::optional<uint32_t> best;
    ptrdiff_t most = 0;
    for (auto from = sharing.begin(); from != sharing.end();) {
      const auto to = std::upper_bound(from, sharing.end(), *from);
      if (to - from > most) {
        most = to - from;
        best = *from;
      }
      from = to;
    }
    return best;
  }

  void add(const Sketch& sketch, uint32_t page) {
    for (const uint64_t value : sketch) first_with_.emplace(value, page);
  }

 private:
  static constexpr size_t window = 32;

  static uint64_t hash(const std::byte* bytes) {
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

  std::unordered_map<uint64_t, uint32_t> first_with_;
};

}  // namespace vmsnap
