// Reads one stored page from a file, given its entry.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "formats/error.h"
#include "formats/image_layout.h"
#include "formats/secret_key.h"

namespace vmsnap {

class ByteSource;

// A file with page frames in it; borrowed, not owned, unless `hold` is set.
struct FrameSource {
  int fd = -1;
  const std::string& name;  // for errors
  uint64_t seed = 0;
  uint64_t end = 0;                // no frame reaches past this byte of the file
  const SecretKey* key = nullptr;  // null: its frames are not sealed
  std::shared_ptr<const void> hold = nullptr;  // keeps all of the above
  const ByteSource* bytes = nullptr;  // read instead of fd, where the file itself is sealed
  uint64_t opening = 0;  // of next_opening(), if nobody writes to the file any more; 0:
                         // it is not to be read ahead
};

// A number for a file that was opened, which no other has had in this process: unlike
// its descriptor's, which the next one gets, and unlike its seed, which a copy has too.
uint64_t next_opening();

// Which file the frames of a pack number are in, of an image that is read.
class FrameFiles {
 public:
  virtual ~FrameFiles() = default;
  // ErrorCode::damaged if there is no such pack, or not the one it must be.
  // Valid as long as this object, and as the source is kept. Any number of threads;
  // may block on the disk.
  virtual Result<FrameSource> source(uint64_t pack) const = 0;
  // The id of the file, the same in every image that refers to it.
  virtual Result<layout::ImageId> file_id(uint64_t pack) const = 0;
};

// Pack 0 only: the frames of an image that has them in its own file.
class OwnFrames : public FrameFiles {
 public:
  OwnFrames(const FrameSource& source, const layout::ImageId& id) : source_(source), id_(id) {}
  Result<FrameSource> source(uint64_t pack) const override;
  Result<layout::ImageId> file_id(uint64_t) const override { return id_; }

 private:
  const FrameSource source_;
  const layout::ImageId id_;
};

// The bytes of the page that `entry_bits`, not 0, refers to; its pack number
// is that of `source`. Reads with one pread(2) if the frame holds one page, and
// with two if it is a delta frame; who reads a complete file in order does so for
// some twenty frames in one call. Thread-safe; blocks on the disk.
// ErrorCode::damaged if the entry, the frame or its base is not what it must be.
Status read_stored_page(const FrameSource& source, uint64_t entry_bits,
                        std::span<std::byte, page_size> out);
Status read_stored_page(const FrameFiles& files, uint64_t entry_bits,
                        std::span<std::byte, page_size> out);

// Where the base of the frame at `offset` is, if that is a delta frame; else 0.
// Errors, threads and blocking as above; the base itself is not looked at.
Result<uint64_t> base_of_stored_page(const FrameSource& source, uint64_t offset);

}  // namespace vmsnap
