#include "formats/store/known_snapshots.h"

#include <algorithm>
#include <cstring>

#include "formats/page_entry.h"

namespace vmsnap {

namespace {
constexpr uint64_t no_page = ~uint64_t{0};
}

Result<std::unique_ptr<KnownSnapshots>> KnownSnapshots::create(const Store& store, PackSet& packs,
                                                               ParentSnapshot parent,
                                                               ContentIndex index,
                                                               const std::vector<Region>& regions) {
  std::unique_ptr<KnownSnapshots> known(
      new KnownSnapshots(store, packs, std::move(parent), std::move(index)));
  const uint64_t leaves =
      layout::align_up(total_pages(regions), layout::leaf_entries) / layout::leaf_entries;
  known->leaves_ = VMSNAP_TRY(SparseArray<LeafPacks>::create(leaves));
  if (!known->parent_.reader) return known;
  uint64_t first = 0;
  for (const Region& region : regions) {
    const uint64_t pages = region.length / page_size;
    for (const Region& old : known->parent_.reader->info().regions) {
      if (old.name != region.name) continue;
      known->same_.push_back({first, std::min(pages, old.length / page_size), old.first_page});
      break;
    }
    first += pages;
  }
  return known;
}

uint64_t KnownSnapshots::parent_page(uint64_t page) const {
  const auto after = std::ranges::upper_bound(same_, page, {}, &SamePlace::first_page);
  if (after == same_.begin()) return no_page;
  const SamePlace& place = *(after - 1);
  const uint64_t offset = page - place.first_page;
  return offset < place.page_count ? place.parent_page + offset : no_page;
}

// With the pack number that the new snapshot has for it; 0 if there is none
// that can be used.
uint64_t KnownSnapshots::parent_entry(uint64_t parent_page) {
  const auto bits = parent_.reader->entry(parent_page);
  if (!bits || *bits == 0) return 0;
  PageEntry entry = PageEntry::from_bits(*bits);
  if (entry.pack == 0 || entry.pack > parent_.packs.size()) return 0;
  entry.pack = usable_pack(parent_.packs[entry.pack - 1].id);
  return entry.pack == 0 ? 0 : entry.pack_bits();
}

// Only a whole pack under its own name is: not one that waits to be deleted,
// nor one in quarantine.
uint64_t KnownSnapshots::usable_pack(const layout::ImageId& id) {
  {
    std::shared_lock lock(usable_mutex_);
    const auto found = usable_.find(id);
    if (found != usable_.end()) return found->second;
  }
  const auto number = [&]() -> Result<uint64_t> {
    const auto file = VMSNAP_TRY(PackFile::open(store_.paths().pack(id), id, store_.master()));
    const layout::PackTrailer trailer = VMSNAP_TRY(file->trailer());
    return packs_.number_of({.id = id,
                             .frames_end = trailer.frames_end,
                             .referenced = 0,
                             .digest = pack_digest(trailer)});
  }();
  std::unique_lock lock(usable_mutex_);
  return usable_[id] = number.value_or(0);
}

bool KnownSnapshots::same_bytes(uint64_t entry, std::span<const std::byte, page_size> bytes) const {
  std::array<std::byte, page_size> stored;
  return read_stored_page(packs_, entry, stored) &&
         std::memcmp(stored.data(), bytes.data(), page_size) == 0;
}

uint64_t KnownSnapshots::same_place(uint64_t page, std::span<const std::byte, page_size> bytes) {
  const uint64_t there = parent_page(page);
  if (there == no_page) return 0;
  const uint64_t entry = parent_entry(there);
  return entry != 0 && may_share(page, entry) && same_bytes(entry, bytes) ? entry : 0;
}

uint64_t KnownSnapshots::same_content(uint64_t hash, uint64_t page,
                                      std::span<const std::byte, page_size> bytes) {
  for (const ContentIndex::Hint& hint : index_.find(hash)) {
    const uint64_t pack = usable_pack(hint.pack);
    if (pack == 0) continue;
    const uint64_t entry = PageEntry{.pack = pack, .offset = hint.offset}.pack_bits();
    if (same_bytes(entry, bytes) && may_share(page, entry)) return entry;
  }
  return 0;
}

bool KnownSnapshots::may_share(uint64_t page, uint64_t entry) {
  const uint64_t pack = PageEntry::from_bits(entry).pack;
  if (packs_.being_written(pack)) return true;
  const uint64_t leaf = page / layout::leaf_entries;
  std::lock_guard lock(leaf_mutexes_[leaf % stripes]);
  LeafPacks& chosen = leaves_[leaf];
  if (!chosen.ready) choose_packs(leaf, chosen);
  const auto place = std::ranges::find_if(
      chosen.numbers, [&](uint16_t number) { return number == 0 || number == pack; });
  if (place == chosen.numbers.end()) return false;
  *place = static_cast<uint16_t>(pack);
  return true;
}

void KnownSnapshots::choose_packs(uint64_t leaf, LeafPacks& chosen) {
  chosen.ready = true;
  std::map<uint64_t, int> counts;
  for (uint64_t slot = 0; slot < layout::leaf_entries; ++slot) {
    const uint64_t there = parent_page(leaf * layout::leaf_entries + slot);
    const uint64_t entry = there == no_page ? 0 : parent_entry(there);
    if (entry != 0) ++counts[PageEntry::from_bits(entry).pack];
  }
  std::vector<std::pair<int, uint64_t>> by_count;
  for (const auto& [pack, count] : counts) by_count.emplace_back(count, pack);
  std::ranges::sort(by_count, std::greater());
  // The others compete for what is left with packs that the index names.
  const size_t kept = std::min(by_count.size(), packs_of_parent);
  for (size_t i = 0; i < kept; ++i) chosen.numbers[i] = static_cast<uint16_t>(by_count[i].second);
}

}  // namespace vmsnap
