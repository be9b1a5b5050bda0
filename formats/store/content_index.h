// Which page contents a store has, by content hash: what survives from one
// snapshot to the next.
//
// A file of hints, 16 bytes each, in sets of eight, found by their hash; read
// with one pread(2) of 128 bytes a question and never loaded, so that opening
// it costs the same whatever its size. A hint may be wrong or gone; whoever
// uses one reads the page and compares its bytes. So nothing here needs to be
// crash-safe or checked: a damaged index costs space, never data, and can be
// made again from the packs.
//
// Size: at most 24 bytes for each page stored, about 16 MiB for each GiB of
// packs, on disk and (what is used of it) in the page cache.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "formats/image_layout.h"
#include "formats/store/pack_layout.h"
#include "formats/store/store_paths.h"

namespace vmsnap {

class ContentIndex {
 public:
  // Where a page with the hash may be.
  struct Hint {
    layout::ImageId pack = {};
    uint64_t offset = 0;  // of its frame
  };

  // The files NAME.hints and NAME.packs. One that is not there, or not one of
  // ours, is empty. Only reads.
  static ContentIndex open(const StorePaths& paths, const std::string& name);

  // At most 8; any number of threads.
  std::vector<Hint> find(uint64_t hash) const;

  // For frames of one pack: adds hints, in place of the oldest where a set is
  // full; makes the files, or larger ones without the hints to packs that are
  // gone, if need be. One process at a time (StoreLock::index); others may read
  // meanwhile, and see the old or the new.
  static Status add(const StorePaths& paths, const std::string& name, const layout::ImageId& pack,
                    std::span<const layout::PackFrame> frames);

 private:
  Fd hints_;
  uint64_t set_count_ = 0;
  std::vector<layout::ImageId> packs_;
};

}  // namespace vmsnap
