// What changed between two snapshots.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/image_reader.h"

namespace vmsnap {

struct SnapshotDiff {
  struct Range {
    std::string region;
    uint64_t offset = 0;  // in the region, bytes
    uint64_t length = 0;
  };
  static constexpr size_t max_ranges = 10000;

  uint64_t pages = 0;                // compared
  uint64_t changed_pages = 0;
  std::vector<Range> ranges;         // neighbours together; at most max_ranges
  std::vector<std::string> only_in_a, only_in_b;  // regions, by name
};

// Regions are matched by name, and compared as far as both go. A page that both
// have in the same place of the same pack is not read. Blocks on the disk;
// ErrorCode::interrupted if a signal asks so.
Result<SnapshotDiff> diff_snapshots(const ImageReader& a, const ImageReader& b);

}  // namespace vmsnap
