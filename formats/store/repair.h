// Makes a damaged store one that new snapshots can be put into again.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/store/store.h"

namespace vmsnap {

struct RepairReport {
  std::vector<std::string> done;  // one sentence each
  uint64_t indexed_pages = 0;
  uint64_t lost_pages = 0;        // that snapshots still cannot give back
};

// Verifies everything; then
// - moves packs that are damaged to quarantine/: what is whole in them is read
//   there by the snapshots that need it, and no new snapshot uses them, so that
//   what was lost is stored again when a VM still has it;
// - moves manifests that cannot be read there, too (ID.manifest);
// - makes every domain's index anew, from the packs of the snapshots.
// Removes nothing. ErrorCode::locked as prune(). Snapshots and restores may run
// meanwhile. Blocks on the disk, for as long as reading all of it takes.
Result<RepairReport> repair_store(const Store& store, std::chrono::milliseconds lock_wait,
                                  int64_t now_unix_ms);

}  // namespace vmsnap
