// What a snapshot of a VM and one of a process have in common: everything but
// the pause.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "snap/capture.h"
#include "snap/guard.h"
#include "snap/snapshot.h"
#include "snap/snapshot_output.h"
#include "snap/vmm/guest_memory.h"
#include "snap/vmm/ksm_pause.h"
#include "snap/vmm/process.h"
#include "snap/vmm/qmp.h"

namespace vmsnap {

class SnapshotJob {
 public:
  // All must outlive the job.
  SnapshotJob(const Process& process, const SnapshotOptions& options,
              const SnapshotProgress& progress)
      : options_(options),
        progress_(progress),
        start_(std::chrono::steady_clock::now()),
        process_(process) {}

  // Returns when nobody else watches the memory, or the time for that is over;
  // whether that took any time.
  Result<bool> wait_for_restore(const std::vector<MemoryBlock>& blocks) const;

  // Checks that only read; then the guard, the output file, the userfaultfd;
  // when this returns, the memory is registered and the target runs on.
  // `qmp` is null for a process; `name` is the target's.
  Status prepare(std::vector<MemoryBlock> blocks, Qmp* qmp, const std::string& name);

  // Right before the pause, so that little is left to do in it.
  Status arm_again() { return capture_->arm_again(); }
  // From here to pause_ended() the guard sends `cont` should we not get to the end.
  void resume_if_we_die() { guard_->pausing(); }
  // The target stands still from pause_begins() to pause_ended().
  void pause_begins();
  void pause_ended();
  // The instant; inside the pause. All is copied here if that is wanted.
  Status arm();

  // Copies, writes, commits. `source` and `device_state` go into the image.
  Result<SnapshotSummary> finish(nlohmann::json source, std::span<const std::byte> device_state);

  const Process& process() const { return process_; }
  const std::string& id() const { return id_; }

 private:
  Status check_pinned(Qmp* qmp) const;
  Status attach(Qmp* qmp);
  void start_copying();
  Status show_copying() const;

  const SnapshotOptions& options_;
  const SnapshotProgress& progress_;
  std::chrono::steady_clock::time_point start_, pause_start_, copy_start_;
  bool armed_ = false, copying_ = false;
  bool copied_in_pause_ = false;
  SnapshotSummary summary_;
  std::string id_;
  int64_t instant_unix_ms_ = 0;

  // In the order of their making; destroyed in reverse, the capture first:
  // that frees the guest.
  const Process& process_;
  GuestMemory memory_;
  uint64_t staging_bytes_ = 0;
  std::optional<KsmPause> ksm_;
  std::optional<Guard> guard_;
  std::unique_ptr<SnapshotOutput> output_;
  std::unique_ptr<Capture> capture_;
};

}  // namespace vmsnap
