// Page frames in a file that is sealed as a whole, which has no descriptor to
// read them from.
#pragma once

#include "formats/byte_source.h"
#include "formats/frame_reader.h"

namespace vmsnap {

// As read_stored_page() of frame_reader.h, but from `bytes`; the descriptor of
// `source` is not used. Thread-safe; blocks on the disk.
Status read_stored_page(const ByteSource& bytes, const FrameSource& source, uint64_t entry_bits,
                        std::span<std::byte, page_size> out);

}  // namespace vmsnap
