// Makes a damaged store one that can be worked with: what is damaged is put
// aside, and the index is made anew. Nothing is ever removed.
//
// A pack in quarantine/ is still read, so that snapshots keep their undamaged
// pages; but new snapshots share nothing with it, and so store anew what they
// find in the guest.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/store/store.h"

namespace vmsnap {

struct StoreRepairOptions {
  std::chrono::milliseconds lock_wait{0};  // for a prune or repair that runs
};

struct StoreRepairReport {
  std::vector<layout::ImageId> quarantined_packs;
  std::vector<layout::ImageId> missing_packs;  // nothing can be done about these
  std::vector<std::string> quarantined_manifests;  // ids
  uint64_t indexed_packs = 0;
  uint64_t indexed_frames = 0;
  std::vector<std::string> sentences;  // what was done, for a person
};

// Puts aside packs that do not open, whose tables are damaged, or that the last
// verify found damaged and a second look does, too; and manifests that cannot
// be read. Then every domain's index is made anew. Snapshots and restores may
// run meanwhile. Does not look for damage that is not known: verify does.
// Waits for the lock of maintenance, then ErrorCode::locked. Interrupted, it
// can be run again. One thread; blocks on the disk.
Result<StoreRepairReport> repair_store(const Store& store, const StoreRepairOptions& options);

}  // namespace vmsnap
