// The page entries of an image being written, and the page tree made of them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "formats/byte_sink.h"
#include "formats/error.h"
#include "formats/image_layout.h"
#include "formats/sparse_array.h"

namespace vmsnap {

// One 64-bit entry a page, zero until set. Memory: 4096 bytes for each 512
// pages of which one is set.
class PageArray {
 public:
  static Result<PageArray> create(uint64_t page_count);

  // Several threads at once, for different pages.
  void set(uint64_t page, uint64_t entry);

  // Element n: the entries with pack number n.
  std::vector<uint64_t> count_packs() const;

  // Appends the tree's blocks in post-order (children by index, then their
  // parent), none for a subtree of zeros. After all set() calls. Returns the
  // reference to the root.
  Result<layout::Reference> write_tree(ByteSink& file, uint64_t image_seed) const;

 private:
  Result<layout::Reference> write_subtree(ByteSink& file, uint64_t image_seed, uint32_t level,
                                          uint64_t index) const;
  Result<layout::Reference> write_block(ByteSink& file, uint64_t image_seed, uint32_t level,
                                        uint64_t index, std::span<const std::byte> block) const;

  uint64_t page_count_ = 0;
  SparseArray<layout::LeafBlock> leaves_;
  SparseArray<uint8_t> leaf_used_;  // reading an untouched leaf would cost a page table entry
};

}  // namespace vmsnap
