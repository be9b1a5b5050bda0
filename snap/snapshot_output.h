// Where a snapshot goes: an image file, or a store.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "formats/image_writer.h"
#include "snap/snapshot.h"

namespace vmsnap {

// For one thread. Destruction before commit() has returned leaves nothing.
class SnapshotOutput {
 public:
  virtual ~SnapshotOutput() = default;

  // Takes the pages. Valid as long as this.
  virtual ImageWriter& image() = 0;

  struct Saved {
    std::string name;    // for people
    uint64_t bytes = 0;  // that the disk holds more than before
  };
  // After the last page; blocks until all is on the disk under its final name.
  virtual Result<Saved> commit(const ImageInfo& info, std::span<const std::byte> device_state,
                               std::span<const uint64_t> working_set) = 0;
};

// What the options say. `regions` are those of the snapshot, `vm` its name.
Result<std::unique_ptr<SnapshotOutput>> open_snapshot_output(const SnapshotOptions& options,
                                                             const std::vector<Region>& regions,
                                                             const std::string& vm);

}  // namespace vmsnap
