// Checks every byte of an image.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/image_file.h"

namespace vmsnap {

// Neighbouring pages of one region that cannot be read back.
struct DamagedRange {
  uint64_t first_page = 0;
  uint64_t page_count = 0;
  std::string region;   // its name
  uint64_t offset = 0;  // of the first page in the region, bytes
  std::string reason;   // for the first page
};

struct VerifyReport {
  // Ranges and reasons kept; beyond that they are only counted.
  static constexpr size_t max_listed = 1000;

  std::string path;
  uint64_t page_count = 0;
  uint64_t data_pages = 0;     // read back whole
  uint64_t zero_pages = 0;     // said to be zero by a tree that is whole
  uint64_t damaged_pages = 0;  // the three add up to page_count
  std::vector<DamagedRange> damaged;
  // What else is wrong, one sentence each: frames (again, as found front to
  // back), padding, the device state, counts.
  std::vector<std::string> other_damage;
  uint64_t damage_count = 0;  // pages and others, also those not listed

  bool ok() const { return damage_count == 0; }
  // ErrorCode::damaged, with the first thing that is wrong, unless ok().
  Status status() const;
};

// `percent` of the work done, rising, from the calling thread.
using VerifyProgress = std::function<void(int percent)>;

// Reads the file twice: front to back, so that no byte is left out, then page
// by page as a restore would. Memory is bounded, whatever the size of the
// image. One thread; blocks on the disk. An error only if the file cannot be
// opened as an image or read at all, and ErrorCode::interrupted; damage further in is
// in the report.
Result<VerifyReport> verify_image(const std::string& path, const VerifyProgress& progress = {});

// Whether a page entry, not 0, leads to a page.
using PageCheck = std::function<Status(uint64_t entry)>;

// The same for a manifest, whose frames are in packs: every byte of it is
// checked here, and its pages by `check`, which is called once for each page
// that is not zero, in page order. An interrupted check (interrupt.h) is worth nothing:
// the caller asks for that.
VerifyReport verify_manifest(const ImageFile& file, const ImageInfo& info, const PageCheck& check);

}  // namespace vmsnap
