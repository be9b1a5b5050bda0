#include "formats/page_tree.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "formats/checksum.h"
#include "formats/damage.h"

namespace vmsnap {

namespace {

// Entries or references of one block of a level.
uint64_t slots(uint32_t level) {
  return level == 1 ? layout::leaf_entries : layout::inner_references;
}

uint64_t pages_per_slot(uint32_t level) { return layout::pages_per_block(level) / slots(level); }

}  // namespace

uint64_t PageTree::Block::entry(uint64_t slot) const {
  uint64_t value;
  std::memcpy(&value, bytes_.data() + slot * sizeof value, sizeof value);
  return value;
}

layout::Reference PageTree::Block::reference(uint64_t slot) const {
  layout::Reference value;
  std::memcpy(&value, bytes_.data() + slot * sizeof value, sizeof value);
  return value;
}

// Direct-mapped: the last block loaded of all those that share a slot.
struct PageTree::Cache {
  static constexpr size_t slot_count = 1024;
  static constexpr size_t lock_count = 64;

  struct Slot {
    uint32_t level = 0;  // 0: free
    uint64_t index = 0;
    BlockPointer block;
  };

  std::array<Slot, slot_count> slots;
  std::array<std::mutex, lock_count> locks;

  static size_t slot_number(uint32_t level, uint64_t index) {
    return (index + level * 257) % slot_count;
  }
};

PageTree::PageTree(const ByteSource& source, const Shape& shape)
    : source_(source), shape_(shape), cache_(std::make_unique<Cache>()) {}

PageTree::~PageTree() = default;

Result<uint64_t> PageTree::entry(uint64_t page) const {
  layout::Reference reference = shape_.root;
  for (uint32_t level = shape_.depth;; --level) {
    if (reference.offset == 0) return 0;
    const BlockPointer block =
        VMSNAP_TRY(load(level, page / layout::pages_per_block(level), reference));
    const uint64_t slot = page / pages_per_slot(level) % slots(level);
    if (level == 1) return block->entry(slot);
    reference = block->reference(slot);
  }
}

Result<uint64_t> PageTree::next_data_page(uint64_t page) const {
  if (page >= shape_.page_count) return shape_.page_count;
  const uint64_t next = VMSNAP_TRY(next_in(shape_.depth, 0, shape_.root, page));
  return std::min(next, shape_.page_count);
}

// The first page >= `page` with data below this block, or the page after it.
Result<uint64_t> PageTree::next_in(uint32_t level, uint64_t index, layout::Reference reference,
                                   uint64_t page) const {
  const uint64_t first = index * layout::pages_per_block(level);
  const uint64_t end = first + layout::pages_per_block(level);
  if (reference.offset == 0) return end;
  const BlockPointer block = VMSNAP_TRY(load(level, index, reference));
  page = std::max(page, first);
  for (uint64_t slot = (page - first) / pages_per_slot(level); slot < slots(level); ++slot) {
    if (level == 1) {
      if (block->entry(slot) != 0) return first + slot;
      continue;
    }
    const uint64_t child = index * slots(level) + slot;
    const uint64_t child_end = (child + 1) * pages_per_slot(level);
    const uint64_t found = VMSNAP_TRY(next_in(level - 1, child, block->reference(slot), page));
    if (found < child_end) return found;
  }
  return end;
}

Result<PageTree::BlockPointer> PageTree::load(uint32_t level, uint64_t index,
                                              layout::Reference reference) const {
  // A (level, index) has one reference in the whole tree, so that it can stand
  // for it as the key.
  const size_t number = Cache::slot_number(level, index);
  Cache::Slot& slot = cache_->slots[number];
  std::mutex& mutex = cache_->locks[number % Cache::lock_count];
  {
    std::lock_guard lock(mutex);
    if (slot.level == level && slot.index == index) return slot.block;
  }
  BlockPointer block = VMSNAP_TRY(read(level, index, reference));
  std::lock_guard lock(mutex);
  slot = {.level = level, .index = index, .block = block};
  return block;
}

Result<PageTree::BlockPointer> PageTree::read(uint32_t level, uint64_t index,
                                              layout::Reference reference) const {
  if (reference.offset % layout::block_size != 0 || reference.offset < shape_.begin ||
      reference.offset >= shape_.end || shape_.end - reference.offset < layout::block_size) {
    return damaged(source_.name(), "no page-tree block can be at byte {}", reference.offset);
  }
  const auto block = std::make_shared<Block>();
  VMSNAP_CHECK(source_.read_exact(reference.offset, block->bytes()));
  if (checksum(block->bytes(), layout::seed_of_block(shape_.image_seed, level, index)) !=
      reference.checksum) {
    return damaged(source_.name(), "the checksum of the page-tree block at byte {} does not match",
                   reference.offset);
  }
  VMSNAP_CHECK(check_contents(level, index, *block));
  return BlockPointer(block);
}

// What must be zero is: everything past the last page, and both halves of the
// reference to a subtree of zeros.
Status PageTree::check_contents(uint32_t level, uint64_t index, const Block& block) const {
  const uint64_t first = index * layout::pages_per_block(level);
  const uint64_t left = shape_.page_count - std::min(shape_.page_count, first);
  const uint64_t used =
      std::min(slots(level), (left + pages_per_slot(level) - 1) / pages_per_slot(level));
  for (uint64_t slot = 0; slot < slots(level); ++slot) {
    const bool zero =
        level == 1 ? block.entry(slot) == 0
                   : block.reference(slot).offset == 0 && block.reference(slot).checksum == 0;
    const bool half_zero = level > 1 && !zero && block.reference(slot).offset == 0;
    if (half_zero || (!zero && slot >= used)) {
      return damaged(source_.name(), "page-tree block {} of level {} uses reserved bytes", index, level);
    }
  }
  return {};
}

}  // namespace vmsnap
