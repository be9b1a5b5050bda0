// `vmsnap restore --reattach DIR`: takes over from a page server that died.
//
// What is found by restore.json, and what is done:
//
//   starting ... loading   the VM was never complete; its guard has ended it.
//                          If it is still there, it is ended now. ErrorCode::vm
//                          says how to start again.
//   loaded, running        QEMU still holds the userfaultfd, so its guest
//                          waits. The descriptor is taken back, waiting faults
//                          are raised again, and the fill goes on. A VM that
//                          was to run and was not told so yet is told now.
//   filled                 only closing the descriptor in QEMU was left to do
//   parking                the VM is about to be parked (ram_drop.h), and is
//                          paused. Without a userfaultfd nothing was taken from
//                          it: it is resumed if it ran. Else as if parked.
//   parked                 served by faults alone, in the background
//   complete, ended        nothing to do; says so
#pragma once

#include <optional>
#include <string>

#include "formats/command.h"
#include "formats/store/image_argument.h"
#include "restore/page_source.h"

namespace vmsnap {

struct ReattachOptions {
  std::string run_dir;
  std::optional<Prefetch> prefetch;  // none: as before
  bool detach = false;
  bool json = false;
  KeySource key;  // of the store that the image is in, if it is encrypted
  bool unpark = false;  // let a parked VM run, and bring the rest
};

// ErrorCode::exists while a page server is at work there (after takeover_patience),
// ErrorCode::damaged when the directory or the image is not what it was, the codes
// of serve_to_end(). Must be called while the process has one thread.
Status reattach_vm(const ReattachOptions& options, CommandContext& context);

// Sends `cont` to a VM that does not run.
Status resume_vm(const std::string& qmp_socket);

}  // namespace vmsnap
