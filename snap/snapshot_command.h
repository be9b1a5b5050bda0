// The `snapshot` command.
#pragma once

#include "formats/command.h"

namespace vmsnap {

void add_snapshot_command(CLI::App& app, CommandContext& context);

}  // namespace vmsnap
