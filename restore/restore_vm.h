// `vmsnap restore`: starts the VM of an image again (vm_start.h), its memory
// lazily, by a page server of its own.
//
// That brings out a userfaultfd that QEMU keeps too, registers all RAM for
// missing faults, overwrites what is there already and starts the page server
// before the device state is loaded; it serves on (served_vm.h) until all pages
// are there. If it dies, the VM waits, and reattach (reattach.h) goes on.
#pragma once

#include "formats/command.h"
#include "restore/vm_start.h"

namespace vmsnap {

// ErrorCode::refused for an image of a process; ErrorCode::vm when QEMU cannot
// be started or does not take the state; the codes of serve_to_end(). Must be
// called while the process has one thread (it forks).
Status restore_vm(const RestoreOptions& options, CommandContext& context);

// --dry-run: prints the command line, quoted for a shell, or with json as an
// array. Makes and starts nothing.
Status print_launch_line(const RestoreOptions& options, CommandContext& context);

}  // namespace vmsnap
