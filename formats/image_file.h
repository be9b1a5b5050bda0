// An image file that is open, with its header and trailer read and checked:
// what the reader and verify share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/frame_reader.h"
#include "formats/byte_source.h"
#include "formats/image_info.h"
#include "formats/image_layout.h"
#include "formats/page_tree.h"

namespace vmsnap {

class ImageFile {
 public:
  // ErrorCode::damaged for what is not a whole image of ours,
  // ErrorCode::unsupported for one that needs a newer vmsnap. Afterwards every
  // section is inside the file and every length in the trailer in its bounds.
  // ErrorCode::usage for a manifest, whose frames are elsewhere.
  static Result<ImageFile> open(const std::string& path);
  // The same from bytes that are open: a manifest, which has no frames itself.
  static Result<ImageFile> open(std::shared_ptr<const ByteSource> source);

  const std::string& path() const { return source_->name(); }
  const ByteSource& source() const { return *source_; }
  const layout::Header& header() const { return header_; }
  const layout::Trailer& trailer() const { return trailer_; }
  uint64_t image_seed() const { return layout::image_seed(header_.id); }

  PageTree::Shape tree_shape() const;

  // The frames in the image's own file. Borrows this object, or only its source if
  // the image was opened from bytes; not for a manifest, which has none.
  FrameSource own_frames() const;
  Status check_own_frames() const;  // ErrorCode::usage for a manifest

  // nullptr if the image has none of this type.
  const layout::Section* find_section(layout::SectionType type) const;

  // Decompressed and checked; empty if there is none. Thread-safe, blocks.
  Result<std::vector<std::byte>> read_section(layout::SectionType type) const;

  // The rows of the section of packs; empty if it has none.
  Result<std::vector<layout::PackRow>> read_packs() const;

  // Page numbers, all below the page count; empty if none were recorded.
  Result<std::vector<uint64_t>> read_working_set() const;

  // The metadata section; its id and page count agree with the trailer's.
  Result<ImageInfo> read_info() const;

 private:
  ImageFile() = default;

  Status read_header(uint64_t file_length);
  Status read_trailer(uint64_t file_length);
  Status check_trailer(uint64_t file_length) const;
  Status check_sections() const;

  std::shared_ptr<const ByteSource> source_;
  int frames_fd_ = -1;  // the source's, if it is a plain file
  uint64_t opening_ = next_opening();
  layout::Header header_ = {};
  layout::Trailer trailer_ = {};
};

// 32 hexadecimal digits.
std::string id_text(const layout::ImageId& id);

}  // namespace vmsnap
