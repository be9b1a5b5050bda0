// `vmsnap clones`: what runs in a farm's directory, and an end to it.
#pragma once

#include <string>
#include <vector>

#include "formats/command.h"

namespace vmsnap {

struct ClonesOptions {
  std::string run_dir;
  std::vector<std::string> names;  // empty: all
  bool wait = false;    // until they have ended
  bool stop = false;    // end them
  bool remove = false;  // and delete their directories
  bool json = false;
};

// ErrorCode::usage for a name that is no clone's there. Blocks up to ten
// seconds for each clone that does not want to end, then kills it.
Status run_clones(const ClonesOptions& options, CommandContext& context);

}  // namespace vmsnap
