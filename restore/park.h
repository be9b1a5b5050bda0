// `vmsnap park` and `vmsnap unpark`: a live VM's memory goes back to the host,
// and comes again from an image when it is touched.
//
// Park pauses the VM, snapshots it, and drops its memory when it is known that
// the image has it (ram_drop.h); a page server in the background then brings
// each page that is touched, and nothing else. It is a lazy restore of a VM
// that never ended: a run directory says how far it got, so that who comes
// after a death can go on (reattach.h). Unpark resumes the VM at once, has the
// page server load the rest, and leaves it as if nothing had happened.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "formats/command.h"
#include "formats/store/image_argument.h"
#include "restore/run_dir.h"

namespace vmsnap {

struct ParkImageRequest {
  std::string qmp;
  std::string output;  // a file ...
  bool replace_output = false;
  StoreArgument store;  // ... or, if it has a directory, a store
  std::vector<std::string> tags;
  std::string dedup_domain;
};

struct ParkImage {
  std::string file;  // as open_image() finds it
  std::string id;
};

// Captures the VM and leaves it paused; when that fails, the VM is as it was.
// What captures belongs to another layer, and is passed in.
using TakeParkImage =
    std::function<Result<ParkImage>(const ParkImageRequest&, CommandContext&)>;

struct ParkOptions {
  ParkImageRequest image;
  std::string run_dir;  // empty: a new one (run_dir.h)
  bool json = false;
};

// Returns when the VM is parked, and a process in the background serves it. If
// it fails, the VM is as it was; if memory was dropped by then, that is loaded
// again in the background. The image stays in any case. Must be called while
// the process has one thread.
Status park_vm(const ParkOptions& options, const TakeParkImage& take_image, CommandContext& context);

struct UnparkOptions {
  std::string run_dir;  // where it was parked, or empty, and
  std::string qmp;      // its monitor, to look for in the default place
  bool json = false;
  KeySource key;  // of the store that the image is in, should the server be dead
};

// Returns when the VM runs, or is left paused if it was, and its pages are
// being loaded in the background. Must be called while the process has one thread.
Status unpark_vm(const UnparkOptions& options, CommandContext& context);

// The same by its page server, which waits for that. ErrorCode::vm if there is none
// that does: reattach_vm() starts one. Waits for its answer, 10 seconds at most.
Status unpark_by_server(const std::string& run_dir, const RestoreRecord& record);

}  // namespace vmsnap
