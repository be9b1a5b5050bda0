// The commands `park` and `unpark`, for the program's main (command.h).
#pragma once

#include "formats/command.h"
#include "restore/park.h"

namespace vmsnap {

// `context` must outlive the parsing and the run.
void add_park_commands(CLI::App& app, CommandContext& context, TakeParkImage take_image);

}  // namespace vmsnap
