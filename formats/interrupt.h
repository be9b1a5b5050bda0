// Ctrl-C and its like, as a question that long work asks itself.
//
// install() makes SIGINT, SIGTERM and SIGHUP set a flag instead of ending the
// process; the same one a second time, for a process that hangs, ends it at once,
// but for SIGHUP, which comes more than once from a terminal that is closed, and
// stays ignored where it was (nohup(1)). For main alone.
// interrupted() is cheap and may be asked from any thread.
#pragma once

#include "formats/error.h"

namespace vmsnap {

void install_interrupt_handlers();
bool interrupted();

// ErrorCode::interrupted if a signal has come.
Status check_interrupted();

}  // namespace vmsnap
