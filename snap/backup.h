// `vmsnap backup`: a list of VMs into a store, then prune, then a sampled
// verify, then the age of what is there; one JSON line an event
// (vmsnap-backup(5)).
#pragma once

#include "formats/command.h"
#include "snap/backup_config.h"

namespace vmsnap {

// Goes on after a VM that failed. Lines to context.out, each at once; messages
// for people to the log. Returns the first of these that happened: locked,
// damaged, no_space, some_failed, stale; or interrupted, at once.
// Blocks for as long as all of it takes.
Status run_backup(const BackupConfig& config, CommandContext& context);

// Only the last step: whether every VM has a snapshot as new as its max-age.
// ErrorCode::stale if not.
Status check_backup_ages(const BackupConfig& config, CommandContext& context);

void add_backup_command(CLI::App& app, CommandContext& context);

}  // namespace vmsnap
