// list, import, rm, undelete, prune, repair, diff
#pragma once

#include "formats/command.h"

namespace vmsnap {

void add_store_commands(CLI::App& app, CommandContext& context);

}  // namespace vmsnap
