// The user's own command at the instant of the snapshot (--in-pause).
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "formats/error.h"

namespace vmsnap {

// Runs `command` with /bin/sh, standard output going to standard error, with
// the given additions ("NAME=value") to the environment. Blocks until it ends
// or `limit` is over; then its whole process group is killed.
// ErrorCode::pause_command unless it exits with 0.
Status run_pause_command(const std::string& command, const std::vector<std::string>& environment,
                         std::chrono::milliseconds limit);

}  // namespace vmsnap
