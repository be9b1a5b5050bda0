// Checks everything that the snapshots of a store need.
//
// Packs are read front to back, each once, however many snapshots use them;
// then every manifest is checked, and each page entry in it against what was
// found of its pack. Nothing is changed but the note of when which pack was
// verified. Snapshots, restores and prune may run meanwhile: packs that nobody
// needs come and go unnoticed.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/store/manifest.h"
#include "formats/store/pack_check.h"
#include "formats/store/store.h"
#include "formats/verify.h"

namespace vmsnap {

struct StoreVerifyOptions {
  // Full ids; none: everything in the store, the trash too.
  std::vector<std::string> snapshots;
  // Read packs of this part of the bytes, 0..1: those that were not verified
  // for the longest time, and besides all in which damage was found before.
  // Page entries for other packs are not looked at; all else of the manifests is.
  double sample = 1;
  // Pass over packs that were found whole since the last run over everything
  // began, if it did not come to its end.
  bool resume = false;
};

struct StoreVerifyProgress {
  uint64_t packs_done = 0;
  uint64_t packs = 0;
  uint64_t bytes_done = 0;
  uint64_t bytes = 0;
};

struct StoreVerifyReport {
  struct Manifest {
    std::string id;
    std::string path;
    bool in_trash = false;
    std::string reason;
    bool damaged = false;  // else of a newer version, say
  };
  struct Snapshot {
    std::string id;
    std::string vm;
    int64_t created_unix_ms = 0;
    bool in_trash = false;
    VerifyReport report;  // which of its pages are damaged, by region
  };

  std::string store;
  uint64_t snapshots = 0;      // that were checked
  uint64_t packs = 0;          // that they need
  uint64_t packs_checked = 0;  // read whole
  uint64_t packs_resumed = 0;  // passed over
  uint64_t bytes_checked = 0;
  uint64_t frames_checked = 0;
  std::vector<PackCheck> damaged_packs;  // without those that are nowhere
  std::vector<layout::ImageId> missing_packs;
  std::vector<Manifest> unreadable;
  std::vector<Snapshot> damaged_snapshots;
  // Whether there is something that 'vmsnap repair' has not put aside yet.
  bool repairable = false;

  bool ok() const {
    return damaged_packs.empty() && missing_packs.empty() && unreadable.empty() &&
           damaged_snapshots.empty();
  }
  // ErrorCode::damaged with what was found, unless ok().
  Status status() const;
};

// One thread; blocks on the disk. Stops between packs, and between manifests,
// with ErrorCode::interrupted; what was verified is noted. Memory: 300 MiB at
// most for frame tables, and what one pack and the report take.
Result<StoreVerifyReport> verify_store(
    const Store& store, const StoreVerifyOptions& options,
    const std::function<void(const StoreVerifyProgress&)>& progress = {});

}  // namespace vmsnap
