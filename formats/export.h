// Writes the memory in an image as plain bytes.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>

#include "formats/error.h"
#include "formats/image_reader.h"

namespace vmsnap {

// All regions one after the other, in the image's order, into `out_path`, with
// holes where pages are zero. The file appears whole or not at all; it may
// replace another only if `replace`. Returns the bytes that are not holes.
// ErrorCode::damaged, naming the page, if one cannot be read back. Blocks.
Result<uint64_t> export_raw(const ImageReader& image, const std::string& out_path, bool replace);

// The same to a stream, zeros included. What was written before an error stays
// written.
Status export_raw(const ImageReader& image, std::ostream& out);

}  // namespace vmsnap
