// The background sweep: copies, in address order, what no write fault has
// brought in yet.
#pragma once

#include "snap/capture_state.h"

namespace vmsnap {

// Runs until every unit is done or claimed by somebody else, or the capture
// has failed; errors go to state.fail(). Called once, in a thread of its own,
// after the memory was armed.
//
// It goes by windows of 2 MiB: a transparent huge page is copied and freed as
// a whole, so that the sweep never splits one.
void sweep(CaptureState& state);

}  // namespace vmsnap
