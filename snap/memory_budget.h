// How much memory a snapshot may take: `--memory`.
#pragma once

#include <cstdint>
#include <optional>

#include "formats/error.h"

namespace vmsnap {

struct MemoryNeeds {
  uint64_t pages = 0;     // of the VM
  unsigned workers = 1;
  bool deltas = false;
};

// Bytes of staging (capture.h) that leave the whole process within `limit`
// bytes; without a limit, within 256 MiB and a thousandth of the VM's RAM. At
// most 64 MiB: more does not help. ErrorCode::usage if the limit is too small
// for the tables, which take 9 bytes a page, and the least of staging.
Result<uint64_t> staging_within(std::optional<uint64_t> limit, const MemoryNeeds& needs);

}  // namespace vmsnap
