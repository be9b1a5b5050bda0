// When each pack of a store was verified last (verified.json): from this a run
// over a sample knows what is due, and one that was killed where to go on.
#pragma once

#include <cstdint>
#include <functional>
#include <map>

#include "formats/error.h"
#include "formats/image_layout.h"
#include "formats/store/store_paths.h"

namespace vmsnap {

struct VerifyState {
  struct Pack {
    int64_t at_unix_ms = 0;
    bool ok = false;
  };

  std::map<layout::ImageId, Pack> packs;
  int64_t began_unix_ms = 0;  // of the last run over everything, if it did not end; else 0

  // What is not there, or not one of ours, is empty: then all packs are due. What
  // is dated ahead was noted by a clock that was wrong: its time is read as 0.
  static VerifyState load(const StorePaths& paths);
  // Blocks on the disk.
  Status save(const StorePaths& paths) const;

  // The newer note of a pack stays.
  void add(const layout::ImageId& id, const Pack& pack);
  // Loads, changes and saves what is noted by now: other runs note theirs, too.
  static Status update(const StorePaths& paths, const std::function<void(VerifyState&)>& change);
};

}  // namespace vmsnap
