// Reads one stored page from a file, given its entry.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "formats/error.h"
#include "formats/image_layout.h"

namespace vmsnap {

// A file with page frames in it; borrowed, not owned.
struct FrameSource {
  int fd = -1;
  const std::string& name;  // for errors
  uint64_t image_seed = 0;
  uint64_t end = 0;  // no frame reaches past this byte of the file
};

// The bytes of the page that `entry_bits`, not 0, refers to. Reads with one
// pread(2) if the frame holds one page. Thread-safe; blocks on the disk.
// ErrorCode::damaged if the entry or the frame is not what it must be.
Status read_stored_page(const FrameSource& source, uint64_t entry_bits,
                        std::span<std::byte, page_size> out);

}  // namespace vmsnap
