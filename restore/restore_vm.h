// `vmsnap restore`: starts the VM of an image again, its memory lazily.
//
//   1  open the image, make the run directory, derive the command line
//   2  start QEMU, guarded, with -incoming defer; connect to its monitor
//   3  bring out a userfaultfd that QEMU keeps too, register all RAM for
//      missing faults, overwrite what is there already, start the page server
//   4  load the device state; the server answers what loading touches
//   5  write down that the VM is complete but for pages ("loaded"), let the
//      guard go, `cont`
//   6  serve on (served_vm.h) until all pages are there
//
// Until 5, whatever goes wrong ends the QEMU that was started and removes what
// was made; so does our death. From 5 on the VM is never ended by us: if the
// page server dies, it waits, and reattach (reattach.h) goes on.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "formats/command.h"
#include "formats/store/image_argument.h"
#include "restore/launch_rules.h"
#include "restore/page_source.h"

namespace vmsnap {

struct RestoreOptions {
  ImageArgument image;
  std::string run_dir;  // empty: a new one
  std::string qemu;     // empty: the recorded executable
  std::string chdir;    // empty: the recorded working directory
  std::vector<Replacement> replacements;
  std::vector<std::string> extra;
  std::optional<Prefetch> prefetch;  // none: all, or nothing when recording
  bool record_working_set = false;
  bool start_paused = false;
  bool detach = false;
  bool json = false;
};

// ErrorCode::refused for an image of a process; ErrorCode::vm when QEMU cannot
// be started or does not take the state; the codes of serve_to_end(). Must be
// called while the process has one thread (it forks).
Status restore_vm(const RestoreOptions& options, CommandContext& context);

// --dry-run: prints the command line, quoted for a shell, or with json as an
// array. Makes and starts nothing.
Status print_launch_line(const RestoreOptions& options, CommandContext& context);

}  // namespace vmsnap
