#include "formats/store/diff.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "formats/interrupt.h"

namespace vmsnap {

namespace {

Result<bool> same_page(const ImageReader& a, uint64_t page_a, const ImageReader& b,
                       uint64_t page_b) {
  if (VMSNAP_TRY(a.location(page_a)) == VMSNAP_TRY(b.location(page_b))) return true;
  std::array<std::byte, page_size> bytes_a, bytes_b;
  VMSNAP_TRY(a.read_page(page_a, bytes_a));
  VMSNAP_TRY(b.read_page(page_b, bytes_b));
  return std::memcmp(bytes_a.data(), bytes_b.data(), page_size) == 0;
}

void add_changed(SnapshotDiff& diff, const std::string& region, uint64_t offset) {
  ++diff.changed_pages;
  if (!diff.ranges.empty()) {
    SnapshotDiff::Range& last = diff.ranges.back();
    if (last.region == region && last.offset + last.length == offset) {
      last.length += page_size;
      return;
    }
  }
  if (diff.ranges.size() < SnapshotDiff::max_ranges) {
    diff.ranges.push_back({region, offset, page_size});
  }
}

}  // namespace

Result<SnapshotDiff> diff_snapshots(const ImageReader& a, const ImageReader& b) {
  SnapshotDiff diff;
  const auto& in_b = b.info().regions;
  for (const Region& region : a.info().regions) {
    const auto other = std::ranges::find(in_b, region.name, &Region::name);
    if (other == in_b.end()) {
      diff.only_in_a.push_back(region.name);
      continue;
    }
    const uint64_t pages = std::min(region.length, other->length) / page_size;
    diff.pages += pages;
    // From one page to the next that has data in either.
    for (uint64_t i = 0; i < pages; ++i) {
      const uint64_t next_a =
          VMSNAP_TRY(a.next_data_page(region.first_page + i)) - region.first_page;
      const uint64_t next_b =
          VMSNAP_TRY(b.next_data_page(other->first_page + i)) - other->first_page;
      i = std::min(next_a, next_b);
      if (i >= pages) break;
      if (!VMSNAP_TRY(same_page(a, region.first_page + i, b, other->first_page + i))) {
        add_changed(diff, region.name, i * page_size);
      }
      if (i % 4096 == 0) VMSNAP_CHECK(check_interrupted());
    }
  }
  for (const Region& region : in_b) {
    if (std::ranges::find(a.info().regions, region.name, &Region::name) == a.info().regions.end()) {
      diff.only_in_b.push_back(region.name);
    }
  }
  return diff;
}

}  // namespace vmsnap
