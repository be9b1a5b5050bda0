// The pages that a restored guest asked for first, in a file beside its image
// (vmsnap-image(5)): hints in which order to load. What it says may be out of
// date or made up, and costs nothing but time then.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "formats/error.h"
#include "formats/image_layout.h"

namespace vmsnap {

namespace layout {

static_assert(std::endian::native == std::endian::little, "structures are copied as they are");

inline constexpr uint32_t working_set_version = 1;
inline constexpr uint64_t working_set_max_pages = max_working_set / sizeof(uint64_t);
inline constexpr std::array<char, 8> working_set_magic = {'\x89', 'V', 'M', 'W',
                                                          'S',    'E', 'T', '\n'};

// At offset 0; the page numbers follow, 8 bytes each, and nothing else.
struct WorkingSetHeader {
  std::array<char, 8> magic;
  uint32_t version;
  uint32_t reserved0;               // must be zero
  ImageId image;                    // of the image that it belongs to
  uint64_t count;                   // of page numbers
  uint64_t pages_checksum;          // of the page numbers, seed 0
  std::array<uint8_t, 8> reserved;  // must be zero
  uint64_t checksum;                // of all before it, seed 0
};
static_assert(sizeof(WorkingSetHeader) == 64 && std::is_trivially_copyable_v<WorkingSetHeader>);

}  // namespace layout

// The bytes of such a file. At most working_set_max_pages of the pages.
std::vector<std::byte> encode_working_set(const layout::ImageId& image,
                                          std::span<const uint64_t> pages);

// Page numbers below `page_count`, each once. ErrorCode::damaged for what is
// not a whole file of ours or is another image's, ErrorCode::unsupported for a
// newer version; `name` is for the error.
Result<std::vector<uint64_t>> decode_working_set(std::span<const std::byte> bytes,
                                                 const layout::ImageId& image, uint64_t page_count,
                                                 const std::string& name);

// The same of a file. Error::os_errno() is ENOENT if there is none.
Result<std::vector<uint64_t>> read_working_set(const std::string& path,
                                               const layout::ImageId& image, uint64_t page_count);

// Replaces `path` as a whole: a temporary file beside it, fsync, rename.
Status write_working_set(const std::string& path, const layout::ImageId& image,
                         std::span<const uint64_t> pages);

}  // namespace vmsnap
