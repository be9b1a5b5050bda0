// One pack file, opened for reading.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "formats/frame_reader.h"
#include "formats/store/pack_layout.h"
#include "formats/store/store_paths.h"

namespace vmsnap {

// Any number of threads; everything blocks on the disk.
class PackFile {
 public:
  // Reads the header. ErrorCode::damaged for what is not the pack `id`;
  // ErrorCode::wrong_key for a sealed pack without `master`.
  static Result<std::unique_ptr<PackFile>> open(const std::string& path, const layout::ImageId& id,
                                                const SecretKey* master);

  const std::string& path() const { return path_; }
  uint64_t length() const { return length_; }
  bool sealed() const { return sealed_; }
  bool may_have_deltas() const { return version_ >= layout::pack_version_deltas; }

  // `end`: where its frames end, at most the length of the file.
  FrameSource frames(uint64_t end) const;

  // The rest is for a pack whose writer finished it, for verify and repair.
  Result<layout::PackTrailer> trailer() const;
  Result<std::vector<layout::PackSegment>> segments(const layout::PackTrailer& trailer) const;
  // Decrypted; in the order of the file.
  Result<std::vector<layout::PackFrame>> frame_table(const layout::PackTrailer& trailer) const;

 private:
  PackFile() = default;

  Fd fd_;
  const uint64_t opening_ = next_opening();
  std::string path_;
  layout::ImageId id_ = {};
  uint64_t length_ = 0;
  uint32_t version_ = 0;
  bool sealed_ = false;
  std::optional<SecretKey> key_;
};

// The pack, wherever it is now (StorePaths::find_pack), also if it moves
// meanwhile.
Result<std::unique_ptr<PackFile>> open_pack(const StorePaths& paths, const layout::ImageId& id,
                                            const SecretKey* master);

// The whole trailer block's digest: what a manifest says of a pack.
Digest pack_digest(const layout::PackTrailer& trailer);

// The name of a pack or snapshot back into its id; false if it is none.
bool parse_id(std::string_view text, layout::ImageId& id);

}  // namespace vmsnap
