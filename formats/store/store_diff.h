// What differs between two snapshots of one store.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/store/store.h"

namespace vmsnap {

// Regions are the same if they have the same name. Bytes of a region, and
// pages as everywhere 4096 of them.
struct SnapshotDiff {
  static constexpr size_t max_listed = 10000;  // ranges, of all regions

  struct Range {
    uint64_t offset = 0;  // in the region
    uint64_t length = 0;
  };
  struct RegionDiff {
    std::string name;
    bool in_a = false;
    bool in_b = false;
    uint64_t common_pages = 0;     // below the end of both
    uint64_t differing_pages = 0;  // of those
    uint64_t only_a_pages = 0;     // past the end of the other
    uint64_t only_b_pages = 0;
    std::vector<Range> differing;  // neighbours put together, rising
  };

  std::vector<RegionDiff> regions;  // those of a in its order, then those that only b has
  uint64_t differing_pages = 0;
  uint64_t only_a_pages = 0;
  uint64_t only_b_pages = 0;
  uint64_t pages_read = 0;  // that were compared byte by byte, because their places differ
  bool all_listed = true;

  bool same() const { return differing_pages == 0 && only_a_pages == 0 && only_b_pages == 0; }
};

// Full ids. Pages in the same place of the same pack are equal without being
// read. Memory: the report. One thread; blocks on the disk; ErrorCode::damaged
// if a page that must be compared cannot be read, interrupted after a signal.
Result<SnapshotDiff> diff_snapshots(const Store& store, const std::string& id_a,
                                    const std::string& id_b);

}  // namespace vmsnap
