// Taking snapshots away, and freeing what nobody needs any more.
//
// Nothing here waits for a snapshot or a restore that runs, nor they for it but
// for some renames. A crash at any point loses nothing: what was begun is ended
// by the next prune.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/retention.h"
#include "formats/store/manifest.h"
#include "formats/store/repack.h"
#include "formats/store/store.h"

namespace vmsnap {

// To the trash, from which undelete takes it back until prune has gone over
// it. `id` as resolve_snapshot() gives it. Block on the disk.
Status remove_snapshot(const Store& store, const std::string& id);
Status undelete_snapshot(const Store& store, const std::string& id);

struct PruneOptions {
  std::optional<KeepRule> keep;  // which snapshots stay; none: all of them
  std::string vm;                // only its snapshots, SnapshotEntry::is_of(); empty: all
  // Only what backup runs took of VMs of these names, backup_name(); none: all.
  std::optional<std::set<std::string>> backup_names = {};
  bool dry_run = false;
  bool empty_trash = false;      // also of what this run puts there
  std::chrono::milliseconds lock_wait{0};
  int64_t now_unix_ms = 0;
  double repack_below = 0.5;     // share of a pack's frames that is still needed; 0: never
};

struct PruneReport {
  struct Decision {
    SnapshotEntry snapshot;
    RetentionDecision decision;
  };
  std::vector<Decision> decisions;   // empty without a rule
  uint64_t kept = 0;
  uint64_t removed = 0;              // put into the trash by this run
  uint64_t deleted = 0;              // taken out of the trash for good
  uint64_t in_use = 0;               // in the trash, but a VM is restored from it
  uint64_t packs_deleted = 0;
  uint64_t freed_bytes = 0;
  uint64_t packs_waiting = 0;        // dead, but somebody may be reading them
  uint64_t waiting_bytes = 0;
  RepackReport repacked;
};

// ErrorCode::locked if another prune or repair is at work for longer than
// lock_wait; ErrorCode::usage if there is no snapshot of `vm`;
// ErrorCode::damaged, with nothing done, if a manifest cannot be read: it is not known then which packs it needs. Where there is no room to repack,
// that is a warning; what else fails of it is the error of a prune that has
// freed what was dead.
Result<PruneReport> prune(Store& store, const PruneOptions& options);

}  // namespace vmsnap
