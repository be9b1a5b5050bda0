// Checks a store: every byte of its packs, every structure of its manifests,
// and that the packs are those that the manifests name.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/store/manifest.h"
#include "formats/store/store.h"

namespace vmsnap {

struct StoreVerifyOptions {
  // Of the packs' bytes; those that were checked longest ago come first, so
  // that runs with a sample of 5 % have seen all after twenty. Which was
  // checked when is kept in the store, so that a run that was ended goes on
  // in the next one.
  double sample = 1;
  int64_t now_unix_ms = 0;
};

struct StoreVerifyReport {
  uint64_t packs_checked = 0, packs_total = 0;
  uint64_t bytes_checked = 0, bytes_total = 0;
  uint64_t snapshots = 0;
  std::vector<std::string> damage;  // one sentence each

  // What damage to packs means: pages of snapshots that cannot be read back.
  struct LostPages {
    std::string id, vm, region;
    uint64_t offset = 0;  // in the region, bytes
    uint64_t page_count = 0;
  };
  static constexpr size_t max_listed = 1000;
  std::vector<LostPages> lost;  // neighbours together; at most max_listed
  uint64_t lost_pages = 0;
  std::vector<layout::ImageId> bad_packs;

  bool ok() const { return damage.empty() && lost_pages == 0; }
  // ErrorCode::damaged unless ok().
  Status status(const StorePaths& paths) const;
};

// Needs no exclusive lock: snapshots, restores and prune may run meanwhile.
// Memory: 2 MiB, and 8 bytes for each damaged frame. An error only if it could
// not be done; damage is in the report. One thread; blocks on the disk.
Result<StoreVerifyReport> verify_store(const Store& store, const StoreVerifyOptions& options,
                                       const std::function<void(int percent)>& progress = {});

}  // namespace vmsnap
