#include "formats/store/store_diff.h"

#include <algorithm>
#include <array>
#include <optional>

#include "formats/interrupt.h"
#include "formats/page_entry.h"

namespace vmsnap {

namespace {

constexpr uint64_t ask_every = 512;  // pages looked at between two questions for a signal

struct Side {
  std::unique_ptr<ImageReader> reader;
  std::vector<layout::PackRow> rows;

  static Result<Side> open(const Store& store, const std::string& id) {
    Side side;
    side.reader = VMSNAP_TRY(store.open_snapshot(id));
    side.rows = VMSNAP_TRY(VMSNAP_TRY(store.open_manifest(store.paths().snapshot(id))).read_packs());
    return side;
  }

  // Where a page is, whatever number its pack has here; none for a zero page.
  struct Place {
    layout::ImageId pack = {};
    uint64_t offset = 0;
    uint64_t slot = 0;
    bool operator==(const Place&) const = default;
  };
  Result<std::optional<Place>> place(uint64_t page) const {
    const uint64_t bits = VMSNAP_TRY(reader->entry(page));
    if (bits == 0) return std::optional<Place>();
    const PageEntry entry = PageEntry::from_bits(bits);
    Place place = {.offset = entry.offset, .slot = entry.slot};
    // One that leads nowhere is found when it is read.
    if (entry.pack != 0 && entry.pack <= rows.size()) place.pack = rows[entry.pack - 1].id;
    return std::optional<Place>(place);
  }
};

class Differ {
 public:
  Differ(const Side& a, const Side& b) : a_(a), b_(b) {}

  Result<SnapshotDiff> run();

 private:
  Status compare(const Region& a, const Region& b, SnapshotDiff::RegionDiff& diff);
  Result<bool> same_page(uint64_t page_a, uint64_t page_b);
  void add(SnapshotDiff::RegionDiff& diff, uint64_t page);

  const Side& a_;
  const Side& b_;
  SnapshotDiff diff_;
  size_t listed_ = 0;
};

Result<SnapshotDiff> Differ::run() {
  std::vector<const Region*> left;
  for (const Region& region : b_.reader->info().regions) left.push_back(&region);
  for (const Region& a : a_.reader->info().regions) {
    SnapshotDiff::RegionDiff diff = {.name = a.name, .in_a = true};
    const auto b = std::ranges::find(left, a.name, [](const Region* region) { return region->name; });
    if (b == left.end()) {
      diff.only_a_pages = a.length / page_size;
    } else {
      diff.in_b = true;
      VMSNAP_CHECK(compare(a, **b, diff));
      left.erase(b);
    }
    diff_.regions.push_back(std::move(diff));
  }
  for (const Region* b : left) {
    diff_.regions.push_back(
        {.name = b->name, .in_b = true, .only_b_pages = b->length / page_size});
  }
  for (const SnapshotDiff::RegionDiff& region : diff_.regions) {
    diff_.differing_pages += region.differing_pages;
    diff_.only_a_pages += region.only_a_pages;
    diff_.only_b_pages += region.only_b_pages;
  }
  return std::move(diff_);
}

Status Differ::compare(const Region& a, const Region& b, SnapshotDiff::RegionDiff& diff) {
  const uint64_t pages_a = a.length / page_size;
  const uint64_t pages_b = b.length / page_size;
  diff.common_pages = std::min(pages_a, pages_b);
  diff.only_a_pages = pages_a - diff.common_pages;
  diff.only_b_pages = pages_b - diff.common_pages;
  uint64_t looked_at = 0;
  for (uint64_t page = 0; page < diff.common_pages; ++page) {
    // What is zero in both is passed over, gigabytes at a time.
    const uint64_t next_a = VMSNAP_TRY(a_.reader->next_data_page(a.first_page + page));
    const uint64_t next_b = VMSNAP_TRY(b_.reader->next_data_page(b.first_page + page));
    page = std::min(next_a - a.first_page, next_b - b.first_page);
    if (page >= diff.common_pages) break;
    if (looked_at++ % ask_every == 0) VMSNAP_CHECK(check_interrupted());
    if (!VMSNAP_TRY(same_page(a.first_page + page, b.first_page + page))) add(diff, page);
  }
  return {};
}

Result<bool> Differ::same_page(uint64_t page_a, uint64_t page_b) {
  if (VMSNAP_TRY(a_.place(page_a)) == VMSNAP_TRY(b_.place(page_b))) return true;
  std::array<std::byte, page_size> bytes_a;
  std::array<std::byte, page_size> bytes_b;
  VMSNAP_TRY(a_.reader->read_page(page_a, bytes_a));
  VMSNAP_TRY(b_.reader->read_page(page_b, bytes_b));
  ++diff_.pages_read;
  return bytes_a == bytes_b;
}

void Differ::add(SnapshotDiff::RegionDiff& diff, uint64_t page) {
  ++diff.differing_pages;
  const uint64_t offset = page * page_size;
  if (!diff.differing.empty() &&
      diff.differing.back().offset + diff.differing.back().length == offset) {
    diff.differing.back().length += page_size;
  } else if (listed_ < SnapshotDiff::max_listed) {
    ++listed_;
    diff.differing.push_back({.offset = offset, .length = page_size});
  } else {
    diff_.all_listed = false;
  }
}

}  // namespace

Result<SnapshotDiff> diff_snapshots(const Store& store, const std::string& id_a,
                                    const std::string& id_b) {
  const Side a = VMSNAP_TRY(Side::open(store, id_a));
  const Side b = VMSNAP_TRY(Side::open(store, id_b));
  return Differ(a, b).run();
}

}  // namespace vmsnap
