// Which packs of a store are needed only in small part.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "formats/error.h"
#include "formats/store/repack.h"
#include "formats/store/store.h"

namespace vmsnap {

struct SparsePack {
  layout::PackRow row = {};
  std::string domain;   // of the snapshots that need it
  uint64_t frames = 0;  // in it
  uint64_t needed = 0;  // of them
  uint64_t bytes = 0;   // of the file
  bool deltas = false;  // there may be delta frames in it
};

using SparsePacks = std::map<layout::ImageId, SparsePack>;

// Finds them some at a time: so many that RepackOptions::batch_bytes holds for those
// that it has to look at, of which it needs a 64th as memory.
class SparsePackFinder {
 public:
  // Reads all manifests. Blocks on the disk, as next() does. Both arguments must
  // outlive the finder.
  static Result<SparsePackFinder> create(const Store& store, const RepackOptions& options);

  // The next ones; nothing: there are no more. Reads the page tables of the snapshots
  // that may need them.
  Result<SparsePacks> next();

 private:
  SparsePackFinder(const Store& store, const RepackOptions& options) : store_(store), options_(options) {}
  Status read_manifests(const std::string& directory, bool to_stay);
  Status look_at(const layout::ImageId& id, SparsePack& pack) const;
  void drop_what_cannot_be();
  SparsePacks next_candidates();
  Status count(const std::string& path, SparsePacks& packs,
               std::map<layout::ImageId, std::vector<bool>>& seen) const;
  bool is_sparse(uint64_t needed, uint64_t frames) const {
    return static_cast<double>(needed) < options_.below * static_cast<double>(frames);
  }

  const Store& store_;
  const RepackOptions& options_;
  SparsePacks candidates_;                    // not looked at yet
  std::map<layout::ImageId, uint64_t> most_;  // page entries of one snapshot that refer to it
  std::set<layout::ImageId> fixed_;           // needed by what must not be written anew
  std::vector<std::string> manifests_;        // paths of those that stay
};

}  // namespace vmsnap
