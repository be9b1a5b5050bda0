// What a new snapshot in a store need not store again: the pages of the VM's
// snapshot before, and whatever the store's index knows.
//
// Locality: the pages of 2 MiB of RAM (a leaf of the page tree) are taken from
// at most 16 packs of earlier snapshots: the 12 that the snapshot before has
// most of them in, and others as they are found. A page that is only in yet
// another pack is stored again, near its neighbours, so that reading a region
// back does not get worse with the age of the store (compare: capping,
// Lillibridge et al., FAST 2013).
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <vector>

#include "formats/image_reader.h"
#include "formats/known_pages.h"
#include "formats/sparse_array.h"
#include "formats/store/content_index.h"
#include "formats/store/pack_set.h"
#include "formats/store/store.h"

namespace vmsnap {

// The snapshot before, of the same VM and domain.
struct ParentSnapshot {
  std::unique_ptr<ImageReader> reader;
  std::vector<layout::PackRow> packs;
};

class KnownSnapshots : public KnownPages {
 public:
  static constexpr size_t packs_of_parent = 12;
  static constexpr size_t max_packs = 16;

  // `store` and `packs` are borrowed; packs of the parent and of the index are
  // given numbers in `packs` when they are first used. The parent's reader may
  // be null. `regions` are the new snapshot's.
  static Result<std::unique_ptr<KnownSnapshots>> create(const Store& store, PackSet& packs,
                                                        ParentSnapshot parent, ContentIndex index,
                                                        const std::vector<Region>& regions);

  uint64_t same_place(uint64_t page, std::span<const std::byte, page_size> bytes) override;
  uint64_t same_content(uint64_t hash, uint64_t page,
                        std::span<const std::byte, page_size> bytes) override;
  bool may_share(uint64_t page, uint64_t entry) override;

 private:
  // A region that the parent has, too, by its name.
  struct SamePlace {
    uint64_t first_page = 0;
    uint64_t page_count = 0;
    uint64_t parent_page = 0;
  };

  // The old packs that a leaf may use; 0: free.
  struct LeafPacks {
    bool ready = false;
    std::array<uint16_t, max_packs> numbers = {};
  };

  KnownSnapshots(const Store& store, PackSet& packs, ParentSnapshot parent, ContentIndex index)
      : store_(store), packs_(packs), parent_(std::move(parent)), index_(std::move(index)) {}

  uint64_t parent_page(uint64_t page) const;  // or no_page
  uint64_t parent_entry(uint64_t parent_page);
  uint64_t usable_pack(const layout::ImageId& id);
  bool same_bytes(uint64_t entry, std::span<const std::byte, page_size> bytes) const;
  void choose_packs(uint64_t leaf, LeafPacks& chosen);

  const Store& store_;
  PackSet& packs_;
  const ParentSnapshot parent_;
  const ContentIndex index_;
  std::vector<SamePlace> same_;

  std::shared_mutex usable_mutex_;
  std::map<layout::ImageId, uint64_t> usable_;  // 0: not to be used

  static constexpr size_t stripes = 64;
  std::array<std::mutex, stripes> leaf_mutexes_;
  SparseArray<LeafPacks> leaves_;
};

}  // namespace vmsnap
