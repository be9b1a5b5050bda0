// list, import, rm, undelete, prune, repair, diff
#pragma once

#include "formats/command.h"

namespace vmsnap {

// prune, repair; part of the former.
void add_upkeep_commands(CLI::App& app, CommandContext& context);

void add_store_commands(CLI::App& app, CommandContext& context);

}  // namespace vmsnap
