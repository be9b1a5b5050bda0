// Ctrl-C and its like, as a question that long work asks itself.
//
// install() makes SIGINT, SIGTERM and SIGHUP set a flag instead of ending the
// process; a second one of them, for a process that hangs, ends it at once.
// interrupted() is cheap and may be asked from any thread.
#pragma once

#include "formats/error.h"

namespace vmsnap {

void install_interrupt_handlers();
bool interrupted();

// ErrorCode::interrupted if a signal has come.
Status check_interrupted();

}  // namespace vmsnap
