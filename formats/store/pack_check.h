// Checks every byte of one pack.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "formats/digest.h"
#include "formats/error.h"
#include "formats/image_layout.h"
#include "formats/secret_key.h"
#include "formats/store/pack_file.h"
#include "formats/store/store_paths.h"

namespace vmsnap {

struct PackCheck {
  // Reasons and frames kept; beyond that they are only counted.
  static constexpr size_t max_listed = 1000;

  layout::ImageId id = {};
  std::string path;     // where it was found; empty if it is nowhere
  bool opened = false;  // its header is right: frames in it can be read
  uint64_t bytes = 0;
  uint64_t frames = 0;            // that were looked at
  std::optional<Digest> digest;   // of its trailer, if that is whole
  uint64_t frames_end = 0;        // as the trailer says
  uint64_t damage_count = 0;
  std::vector<std::string> reasons;   // one sentence each
  uint64_t lost_count = 0;            // frames that cannot be read, as far as they are known
  std::vector<uint64_t> lost_frames;  // their offsets in the file, rising
  // Bytes [first, second) with another digest than they were written with,
  // although every frame in them has its right checksum: counted as lost.
  std::vector<std::pair<uint64_t, uint64_t>> doubtful;

  bool whole() const { return damage_count == 0; }
  bool doubts(uint64_t offset) const;
};

// Reads the pack once, front to back: header, segments against their digests,
// each frame's header and checksum, end mark, tables, padding, trailer. `rows`
// are what manifests say of it; it must be the pack that one of them means.
// Needs no key, but for the frame table of a sealed pack, which is left out
// without one. Damage is in the result, also that the pack is missing or that
// its disk cannot read it; an error is something else. Memory: the pack's
// tables, and 2 MiB. One thread; blocks on the disk.
Result<PackCheck> check_pack(const StorePaths& paths, const layout::ImageId& id,
                             const SecretKey* master, std::span<const layout::PackRow> rows);

// The same for a pack that is open.
PackCheck check_open_pack(const PackFile& pack, const layout::ImageId& id, bool with_table,
                          std::span<const layout::PackRow> rows);

}  // namespace vmsnap
