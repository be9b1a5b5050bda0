// Going into the background: what a forked child does that is to serve on when
// the command has returned.
#pragma once

#include <string>

namespace vmsnap {

// A session of its own, no terminal; what is logged goes to `log_path`, with
// the time. Ctrl-C and a hang-up are ignored; SIGTERM ends it like any process.
void become_background(const std::string& log_path);

}  // namespace vmsnap
