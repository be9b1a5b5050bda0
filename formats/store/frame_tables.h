// Where the frames of packs begin, for as many packs as fit into memory.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "formats/error.h"
#include "formats/image_layout.h"
#include "formats/secret_key.h"
#include "formats/store/store_paths.h"

namespace vmsnap {

// For one thread; blocks on the disk.
class FrameTables {
 public:
  // Bytes of all that are kept; the one used longest ago goes first. Pages that
  // are near each other are in few packs (KnownSnapshots), so that a table is
  // seldom read twice.
  static constexpr size_t max_bytes = 256 << 20;

  // Both are borrowed.
  FrameTables(const StorePaths& paths, const SecretKey* master) : paths_(paths), master_(master) {}

  // Whether a frame of the pack begins at `offset`, by its frame table.
  Result<bool> begins(const layout::ImageId& pack, uint64_t offset);

 private:
  struct Table {
    std::vector<uint32_t> offsets;  // in units of frame_alignment, rising
    uint64_t used = 0;
  };

  Status load(const layout::ImageId& pack, Table& table);

  const StorePaths& paths_;
  const SecretKey* const master_;
  std::map<layout::ImageId, Table> tables_;
  size_t bytes_ = 0;
  uint64_t uses_ = 0;
};

}  // namespace vmsnap
