// `vmsnap restore --clones N`: starts VMs from one image that share its memory.
//
// A keeper (farm_keeper.h) is started, or the one of the directory joined.
// Each clone is started by a process of its own (clone_process.h), several at a
// time, in its own run directory DIR/NUMBER; they run when all are loaded. "{clone}"
// in the arguments is its number.
//
// A clone that cannot be started harms no other.
#pragma once

#include <cstdint>

#include "formats/command.h"
#include "restore/vm_start.h"

namespace vmsnap {

struct CloneOptions {
  RestoreOptions vm;  // for each; its run_dir is the farm's
  unsigned count = 1;
  uint64_t memory = 0;  // limit of the shared pages, bytes; 0: none
};

// With `detach` returns when the guests run, else when the last clone has
// ended. ErrorCode::some_failed when some could not be started,
// ErrorCode::exists when the directory's farm is of another image,
// ErrorCode::interrupted after a signal: the clones run on. Must be called while
// the process has one thread.
Status start_clones(const CloneOptions& options, CommandContext& context);

// A new keeper for a farm whose page server died. ErrorCode::vm when no clone
// lives any more.
Status reattach_farm(const std::string& run_dir, const KeySource& key, bool json,
                     CommandContext& context);

}  // namespace vmsnap
