// The working set of an image: the pages that its guest wants first.
//
// A restore can record one (working_set_file.h): IMAGE.working-set beside an
// image file, working-sets/ID in a store. The capture records one in the image.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/image_reader.h"

namespace vmsnap {

// Where the working set that a restore records of this image is.
std::string working_set_path(const ImageReader& image);

// The one that a restore recorded, if there is one that can be read (if it
// cannot, a warning says so), else the one that the image has. Image pages,
// most wanted first; empty if neither is there. Blocks on the disk.
Result<std::vector<uint64_t>> best_working_set(const ImageReader& image);

// Replaces what an earlier restore recorded. Blocks on the disk.
Status save_working_set(const ImageReader& image, std::span<const uint64_t> pages);

}  // namespace vmsnap
