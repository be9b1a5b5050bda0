// Reads one image (vmsnap-image(5)).
//
// Opening reads the header, the trailer and the metadata: its cost does not
// depend on how much memory the image holds. Every structure is checked
// against its checksum before it is parsed, every length bounded before it is
// used. The file is read with pread(2), never mapped, so that a failing disk
// or a file cut short is an error value and not a signal.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/frame_reader.h"
#include "formats/image_file.h"
#include "formats/image_info.h"
#include "formats/sealed_file.h"

namespace vmsnap {

enum class PageKind { zero, data };

struct ImageSummary {
  uint32_t format_version = 0;
  uint64_t file_bytes = 0;
  uint64_t page_count = 0;
  uint64_t zero_pages = 0;
  uint64_t duplicate_pages = 0;
  uint64_t stored_pages = 0;
  uint64_t device_state_bytes = 0;
};

// All zero for a page of zeros.
struct PageLocation {
  layout::ImageId file = {};
  uint64_t offset = 0;  // of its frame
  uint64_t slot = 0;
  bool operator==(const PageLocation&) const = default;
};

class ImageReader {
 public:
  // ErrorCode::damaged for what is not a whole image of ours,
  // ErrorCode::unsupported for a newer format version.
  // ErrorCode::usage for a snapshot of a store, which needs its packs.
  static Result<std::unique_ptr<ImageReader>> open(const std::string& path);
  // The same in a file that is sealed as a whole.
  static Result<std::unique_ptr<ImageReader>> open(std::shared_ptr<const SealedSource> file);
  // A snapshot of a store; `frames` finds its packs.
  static Result<std::unique_ptr<ImageReader>> open(ImageFile file,
                                                   std::unique_ptr<FrameFiles> frames);
  ~ImageReader();

  const ImageInfo& info() const;
  const ImageSummary& summary() const;
  const std::string& path() const;
  uint64_t page_count() const { return summary().page_count; }

  // The bytes of one page; zeros for a zero page. Any number of threads at
  // once. Blocks on the disk. ErrorCode::damaged when the page, or the table
  // that leads to it, is not what its checksum says; `out` is then undefined.
  Result<PageKind> read_page(uint64_t page, std::span<std::byte, page_size> out) const;

  // Whether a page is zero, without reading its data. Thread-safe.
  Result<PageKind> page_kind(uint64_t page) const;

  // The first page >= `page` that is not zero, or page_count() if none is.
  // Skips untouched gigabytes in O(tree blocks skipped). Thread-safe.
  Result<uint64_t> next_data_page(uint64_t page) const;

  // The page entry as it is in the page tree: 0 for a zero page. Thread-safe.
  Result<uint64_t> entry(uint64_t page) const;

  // Where the page is: pages at one place are equal. Thread-safe.
  Result<PageLocation> location(uint64_t page) const;

  // Pages in the order in which the guest first wrote them after the instant,
  // as far as it was recorded.
  Result<std::vector<uint64_t>> working_set() const;

  // Device state as the VM gave it; empty for a process.
  Result<std::vector<std::byte>> device_state() const;

 private:
  struct State;
  explicit ImageReader(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace vmsnap
