// The background sweep: copies what no write fault has brought in yet. First
// what was written shortly before the instant, because it will be written
// again; then all, in address order.
#pragma once

#include "snap/capture_state.h"

namespace vmsnap {

// Runs until every unit is done or claimed by somebody else, or the capture
// has failed; errors go to state.fail(). Called once, in a thread of its own,
// after the memory was armed.
void sweep(CaptureState& state);

}  // namespace vmsnap
