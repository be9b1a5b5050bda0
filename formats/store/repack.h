// Making packs that are needed only in small part into new ones that are needed
// as a whole, so that the space of the rest can be freed.
//
// What is needed of such a pack is copied into new packs, neighbours in RAM
// next to each other; then the manifests that refer to it are written anew,
// with the same ids and names, and put in place of the old ones under the
// commit lock. The old packs are then dead like any others: prune takes them
// away, and whoever reads them goes on reading (store_lock.h). A crash in
// between leaves new packs that nobody needs, or old ones: the next prune takes
// them.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>

#include "formats/error.h"
#include "formats/store/store.h"

namespace vmsnap {

struct RepackOptions {
  // A pack is repacked if less than this share of its frames is needed; 0: none.
  double below = 0.5;
  bool dry_run = false;
  // Snapshots that are about to go; packs that they need are left alone, as
  // those are that a snapshot in the trash, or one that is being restored, needs.
  std::set<std::string> leaving;
  // Of packs at a time: bounds memory, some 60 bytes a page that is moved, and the space
  // that is needed until the old ones are gone.
  uint64_t batch_bytes = uint64_t{2} << 30;
  uint64_t pack_bytes = 64 << 20;  // of new packs
};

struct RepackReport {
  uint64_t packs = 0;         // mostly not needed, and now dead (in a dry run: would be)
  uint64_t needed_bytes = 0;  // of them, about
  uint64_t bytes = 0;         // all of them
  uint64_t manifests = 0;     // written anew
};

// `free_dead_packs` is called after each batch. The caller holds StoreLock::maintain. Blocks on the disk; ends with
// ErrorCode::interrupted if a signal asks so. A pack that cannot be read stays
// as it is, with a warning if that is found only now. After an error `report`
// has what was done before it; what was not is as it was.
Status repack(const Store& store, const RepackOptions& options, RepackReport& report,
              const std::function<Status()>& free_dead_packs);

}  // namespace vmsnap
