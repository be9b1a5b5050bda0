// Reads all page frames of an image in the order of the file.
#pragma once

#include <cstdint>
#include <functional>

#include "formats/error.h"
#include "formats/image_file.h"

namespace vmsnap {

struct FrameWalk {
  uint64_t frames = 0;
  uint64_t pages = 0;
};

// Checks header, checksum and padding of every frame between the header block
// and the end mark, and the end mark. A frame whose payload is damaged is given
// to `found` and passed over; anything after which the next frame cannot be
// found is an error. Memory: one buffer of 1 MiB. One thread; blocks.
Result<FrameWalk> walk_frames(const ImageFile& file, const std::function<void(const Error&)>& found,
                              const std::function<void(uint64_t offset)>& progress);

}  // namespace vmsnap
