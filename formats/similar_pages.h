// Finds, for a page, one stored before that has much in common with it, at
// whatever offset: memory holds a program's code in its file, in archives and in
// objects, and heaps hold the same text and structures again and again.
//
// A page's sketch is the least hashes of the 32-byte strings in it that begin
// where the bytes themselves say so. Two pages share a part of their sketches as
// large as the part of the strings that they share (Broder, "On the resemblance
// and containment of documents", 1997).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "formats/error.h"
#include "formats/image_info.h"
#include "formats/sparse_array.h"

namespace vmsnap {

class Sketch {
 public:
  static constexpr size_t max_hashes = 8;

  // About 5 us.
  explicit Sketch(std::span<const std::byte, page_size> page);

  std::span<const uint64_t> hashes() const { return std::span(hashes_).first(count_); }

 private:
  void add(uint64_t hash);

  std::array<uint64_t, max_hashes> hashes_ = {};  // rising
  size_t count_ = 0;
};

// Which stored pages have a hash in their sketch: a bounded table, in which new
// hashes overwrite old ones. What it says is a hint, and costs space when wrong.
//
// Any number of threads; never blocks. Memory: 16 bytes for each of `slots`, as
// they are filled.
class SimilarPages {
 public:
  // `slots` is rounded up to a power of two.
  static Result<std::unique_ptr<SimilarPages>> create(size_t slots);

  // The entries in pack number `pack` of pages that share a hash with the
  // sketch, each as often as they share one, behind what `found` has already.
  void find(const Sketch& sketch, uint64_t pack, std::vector<uint64_t>& found) const;

  // `entry`: a packed PageEntry of a page that can be read, from now on.
  void add(const Sketch& sketch, uint64_t entry);

 private:
  // The two are read and written one by one: a mixture of two pages' leads to
  // one of them.
  struct Slot {
    uint64_t hash;
    uint64_t entry;  // 0: free
  };

  SimilarPages() = default;
  // The low bits: the hashes of sketches are small numbers.
  Slot& slot_of(uint64_t hash) const { return slots_[hash & (slots_.size() - 1)]; }
  uint64_t entry_of(uint64_t hash, uint64_t pack) const;  // or 0

  mutable SparseArray<Slot> slots_;
};

// What is in `values` most often, the first of several; 0 if it is empty.
uint64_t most_frequent(std::vector<uint64_t>& values);

}  // namespace vmsnap
