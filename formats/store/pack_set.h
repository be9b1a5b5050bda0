// The packs that one image refers to, by the numbers in its page entries.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "formats/frame_reader.h"
#include "formats/store/pack_file.h"
#include "formats/store/store_paths.h"

namespace vmsnap {

// Packs are opened when they are read, and stay open until there are too many for
// the descriptors that a process may have: a snapshot may refer to thousands. Any
// number of threads.
class PackSet : public FrameFiles {
 public:
  // `master` (borrowed) is null for a store that is not sealed.
  PackSet(StorePaths paths, const SecretKey* master);

  // The numbers 1, 2, ... for the rows of a manifest, in a set that is empty.
  void add_rows(const std::vector<layout::PackRow>& rows);

  // The number of this pack, a new one if it has none yet; ErrorCode::refused
  // past 65535. `row`'s `referenced` is not looked at.
  Result<uint64_t> number_of(const layout::PackRow& row);
  // For a pack that is being written: readable from `fd` (borrowed) at once.
  Result<uint64_t> add_open(const layout::ImageId& id, int fd, const std::string& name,
                            const SecretKey* key);
  bool being_written(uint64_t number) const;  // of a number that was given
  // Now it has its row.
  void set_row(uint64_t number, const layout::PackRow& row);

  layout::PackRow row(uint64_t number) const;  // of a number that was given
  uint64_t size() const;                       // numbers 1..size() are in use

  Result<FrameSource> source(uint64_t pack) const override;
  Result<layout::ImageId> file_id(uint64_t pack) const override;

 private:
  struct Pack {
    layout::PackRow row = {};
    std::shared_ptr<PackFile> file;  // null while it is not open
    int fd = -1;                     // of a pack being written
    std::string name;
    const SecretKey* key = nullptr;
  };

  Result<uint64_t> add_locked(std::unique_ptr<Pack> pack);
  Status open_locked(uint64_t number) const;
  FrameSource source_of(const Pack& pack) const;

  const StorePaths paths_;
  const SecretKey* const master_;
  const size_t max_open_;
  mutable std::shared_mutex mutex_;
  mutable std::vector<std::unique_ptr<Pack>> packs_;  // number - 1
  mutable std::deque<uint64_t> open_;                 // numbers, opened longest ago first
  std::map<layout::ImageId, uint64_t> numbers_;
};

}  // namespace vmsnap
