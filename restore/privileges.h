// Giving up what a server does not need.
#pragma once

#include <string>
#include <vector>

#include "formats/error.h"

namespace vmsnap {

// Of the calling thread and those that it makes from now on: no privileges by
// executing a program (no_new_privs), no capabilities, none in the bounding and
// ambient sets. The user id stays, so that our own files can still be opened:
// the packs of a store are, when they are first needed. For the same reason
// CAP_DAC_READ_SEARCH stays if one of `read`, files or directories, is another's
// or cannot be reached without it, and CAP_DAC_OVERRIDE if one of `written` is.
// Nothing to read is at a path where nothing is. Irrevocable.
//
// Sources: capabilities(7), capset(2), prctl(2).
Status drop_privileges(const std::vector<std::string>& read,
                       const std::vector<std::string>& written = {});

}  // namespace vmsnap
