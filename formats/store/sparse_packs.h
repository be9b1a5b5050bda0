// Which packs of a store are needed only in small part.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/store/repack.h"
#include "formats/store/store.h"

namespace vmsnap {

struct SparsePack {
  layout::PackRow row = {};
  std::string domain;         // of the snapshots that need it
  uint64_t frames = 0;        // in it
  uint64_t bytes = 0;         // of the file
  bool deltas = false;        // there may be delta frames in it
  std::set<uint64_t> needed;  // offsets of frames
};

// Reads all manifests, and the page tables of those that need a candidate.
// Blocks on the disk.
Result<std::map<layout::ImageId, SparsePack>> find_sparse_packs(const Store& store,
                                                                const RepackOptions& options);

}  // namespace vmsnap
