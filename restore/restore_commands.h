// The commands `restore` and `serve`, for the program's main (command.h).
#pragma once

#include "formats/command.h"

namespace vmsnap {

// `context` must outlive the parsing and the run.
void add_restore_commands(CLI::App& app, CommandContext& context);

}  // namespace vmsnap
