// Starts the VM of an image, up to the running guest. How its memory comes is
// the caller's business (TakeMemory): a page server of its own, or a farm's.
//
//   1  make the run directory, derive the command line
//   2  start QEMU, guarded, with -incoming defer; connect to its monitor
//   3  TakeMemory: from here on whoever touches the memory is served
//   4  load the device state
//   5  write down that the VM is complete but for pages ("loaded"), let the
//      guard go, `cont`
//
// Until 5, whatever goes wrong ends the QEMU that was started and removes what
// was made; so does our death. From 5 on the VM is never ended by us.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "formats/command.h"
#include "formats/store/image_argument.h"
#include "restore/launch.h"
#include "restore/launch_rules.h"
#include "restore/served_vm.h"
#include "snap/vmm/qmp.h"

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
  bool fix_clock = false;  // set the guest's clock, through its agent
  bool detach = false;
  bool json = false;
};

// What is asked of the launch rules, from an image. ErrorCode::refused for an
// image of a process.
Result<LaunchRequest> launch_request(const RestoreOptions& options, const ImageReader& image);

// Fills in the record's `uffd` and `ranges`, and whatever it needs of the VM
// that is given.
using TakeMemory = std::function<Status(ServedVm& vm, Qmp& qmp)>;

// What the caller has a say in.
struct VmStartHooks {
  TakeMemory take_memory;
  // After an error: must end whoever serves the VM, before that goes.
  std::function<void()> let_go = [] {};
  // Everything is loaded; blocks until the guest may run. An error ends the VM.
  std::function<Status()> may_run = []() -> Status { return {}; };
};

class VmStart {
 public:
  // `options` must outlive this. `image` is taken over.
  VmStart(const RestoreOptions& options, std::unique_ptr<ImageReader> image,
          std::chrono::steady_clock::time_point started);
  ~VmStart();

  // ErrorCode::vm when QEMU cannot be started or does not take the state; the
  // errors of the hooks. Must be called while the process has one thread (it
  // forks).
  Status run(const VmStartHooks& hooks);

  // After a run() without error.
  ServedVm& vm() { return *vm_; }

 private:
  Status prepare();
  Status until_running(const VmStartHooks& hooks);
  Status start_guest(Qmp& qmp);
  void fix_clock() const;
  Status enter(RestorePhase phase);

  const RestoreOptions& options_;
  const std::chrono::steady_clock::time_point started_;
  std::unique_ptr<ImageReader> image_;
  LaunchLine line_;
  // In the order of their making: QEMU is killed before the directory goes.
  std::unique_ptr<ServedVm> vm_;
  std::unique_ptr<StartedVm> qemu_;
};

}  // namespace vmsnap
