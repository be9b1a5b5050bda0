// Capturing what is still to be captured of a few neighbouring pages, and letting
// writers in again.
#pragma once

#include "snap/capture_state.h"

namespace vmsnap {

// Claims what is still armed of units [first, end) of 4 KiB, copies it into
// `chunk`, looks at the marks again and frees it; who waits for any of them is
// woken. Units that others have claimed are left to them.
// `chunk` must have room for all. Any thread; blocks for as long as copying takes:
// nobody's writes wait longer than that.
Status copy_window(CaptureState& state, CapturedPiece& piece, uint64_t first, uint64_t end,
                   Chunk& chunk);

// What follows when all of a claimed unit larger than a page has been copied: looks
// at its mark again and frees it; who waits for it is woken. Any thread.
Status free_large_unit(CaptureState& state, CapturedPiece& piece, uint64_t unit);

}  // namespace vmsnap
