#include "formats/page_array.h"

#include <algorithm>
#include <atomic>
#include <span>

#include "formats/checksum.h"
#include "formats/page_entry.h"

namespace vmsnap {

Result<PageArray> PageArray::create(uint64_t page_count) {
  PageArray array;
  array.page_count_ = page_count;
  const uint64_t leaves = layout::align_up(page_count, layout::leaf_entries) / layout::leaf_entries;
  array.leaves_ = VMSNAP_TRY(SparseArray<layout::LeafBlock>::create(leaves));
  array.leaf_used_ = VMSNAP_TRY(SparseArray<uint8_t>::create(leaves));
  return array;
}

void PageArray::set(uint64_t page, uint64_t entry) {
  if (entry == 0) return;
  const uint64_t leaf = page / layout::leaf_entries;
  leaves_[leaf][page % layout::leaf_entries] = entry;
  // Neighbouring pages may be set by another thread.
  std::atomic_ref(leaf_used_[leaf]).store(1, std::memory_order_relaxed);
}

std::vector<uint64_t> PageArray::count_packs() const {
  std::vector<uint64_t> counts(1);
  for (uint64_t leaf = 0; leaf < leaf_used_.size(); ++leaf) {
    if (!leaf_used_[leaf]) continue;
    for (const uint64_t entry : leaves_[leaf]) {
      if (entry == 0) continue;
      const uint64_t pack = PageEntry::from_bits(entry).pack;
      if (pack >= counts.size()) counts.resize(pack + 1);
      ++counts[pack];
    }
  }
  return counts;
}

Result<layout::Reference> PageArray::write_tree(ByteSink& file, uint64_t image_seed) const {
  VMSNAP_CHECK(file.pad_to(layout::block_size));
  return write_subtree(file, image_seed, layout::tree_depth(page_count_), 0);
}

Result<layout::Reference> PageArray::write_subtree(ByteSink& file, uint64_t image_seed,
                                                   uint32_t level, uint64_t index) const {
  if (level == 1) {
    if (index >= leaf_used_.size() || !leaf_used_[index]) return layout::Reference{};
    return write_block(file, image_seed, level, index, std::as_bytes(std::span(leaves_[index])));
  }
  layout::InnerBlock block = {};
  bool used = false;
  for (uint64_t child = 0; child < layout::inner_references; ++child) {
    const uint64_t child_index = index * layout::inner_references + child;
    if (child_index * layout::pages_per_block(level - 1) >= page_count_) break;
    block[child] = VMSNAP_TRY(write_subtree(file, image_seed, level - 1, child_index));
    used = used || block[child].offset != 0;
  }
  if (!used) return layout::Reference{};
  return write_block(file, image_seed, level, index, std::as_bytes(std::span(block)));
}

Result<layout::Reference> PageArray::write_block(ByteSink& file, uint64_t image_seed,
                                                 uint32_t level, uint64_t index,
                                                 std::span<const std::byte> block) const {
  const layout::Reference reference = {
      .offset = file.offset(),
      .checksum = checksum(block, layout::seed_of_block(image_seed, level, index))};
  VMSNAP_CHECK(file.append(block));
  return reference;
}

}  // namespace vmsnap
