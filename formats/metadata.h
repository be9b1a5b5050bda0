// The metadata section: an ImageInfo as a JSON document.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/image_info.h"

namespace vmsnap {

inline constexpr size_t max_regions = 65536;
inline constexpr size_t max_region_name = 255;                       // bytes
inline constexpr size_t max_tags = 64;
inline constexpr size_t max_tag_bytes = 255;  // also of a domain
inline constexpr int64_t max_created_unix_ms = 253'402'300'799'999;  // the end of the year 9999

// ErrorCode::usage for tags, or a domain, that an image cannot have: asked before
// one is made, of what the user gave.
Status check_tags(const std::vector<std::string>& tags, const std::string& domain);

// Refuses what decode_metadata() would. What is not UTF-8 in a text becomes
// U+FFFD. `name` is the image's file, for errors.
Result<std::string> encode_metadata(const ImageInfo& info, uint64_t page_count,
                                    const std::string& name);

// ErrorCode::damaged unless `json` is a document that vmsnap-image(5) allows,
// with regions of `page_count` pages in all. Any bytes are safe.
Result<ImageInfo> decode_metadata(std::span<const std::byte> json, uint64_t page_count,
                                  const std::string& name);

}  // namespace vmsnap
