// What every image ends with: page tree, sections, trailer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "formats/byte_sink.h"
#include "formats/error.h"
#include "formats/image_info.h"
#include "formats/image_layout.h"
#include "formats/page_array.h"

namespace vmsnap {

struct PageCounts {
  uint64_t zero = 0;
  uint64_t duplicate = 0;  // share the frame of another page, here or in the store
  uint64_t stored = 0;
  uint64_t bytes = 0;  // that the stored ones take in the file
};

// Sections other than the metadata; an empty one is left out.
struct ImageSections {
  std::span<const std::byte> device_state;    // at most 256 MiB
  std::span<const std::byte> packs;           // layout::PackRow, of a snapshot in a store
  std::span<const uint64_t> working_set;      // page numbers; what is past the limit is left out
};

struct ImageTail {
  layout::ImageId id = {};
  const PageArray& pages;
  PageCounts counts;
  uint64_t page_count = 0;
  uint64_t frames_end = 0;    // in this file
  int zstd_level = 1;  // of the sections
};

// With its checksum.
layout::Header make_header(const layout::ImageId& id, uint64_t incompatible = 0);

// Header and end mark: the front of an image whose frames are all in packs.
Status append_empty_frames(ByteSink& file, const layout::ImageId& id);

// Appends to `file`, whose offset is frames_end. `info` must have regions of
// page_count pages in all; its id and the regions' first pages are filled in
// here. Returns the length of the file; does not finish() it. One thread;
// blocks on the disk.
Result<uint64_t> write_tail(ByteSink& file, const ImageTail& tail, const ImageInfo& info,
                            const ImageSections& sections, const std::string& name);

// 16 random bytes.
Result<layout::ImageId> random_id();

}  // namespace vmsnap
