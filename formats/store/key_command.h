// `vmsnap key`: which keys open an encrypted store.
#pragma once

#include "formats/command.h"

namespace vmsnap {

void add_key_command(CLI::App& app, CommandContext& context);

}  // namespace vmsnap
