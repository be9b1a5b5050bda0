// Taking a snapshot: of a QEMU behind its monitor, or of ranges of any process.
//
// One call does the whole of it and blocks until the image is committed under
// its final name. Whatever fails, the VM runs on (or stays paused, if it was),
// nothing of ours is left in it, and no image exists under the name.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/store/store.h"
#include "snap/capture_state.h"
#include "snap/vmm/monitor_address.h"

namespace vmsnap {

struct SnapshotOptions {
  std::string output;  // an image file ...
  bool replace_output = false;
  StoreOptions store;  // ... or, if it has a directory, a store
  std::string dedup_domain;
  std::vector<std::string> tags;
  bool without_disks = false;  // --disks none
  std::string pause_command;   // --in-pause, empty for none
  std::chrono::milliseconds pause_command_limit{10000};
  // A VM that runs is left paused at the instant, if the image was committed;
  // until then whatever ends us resumes it.
  bool stay_paused = false;
  // How long the guest may wait for us, or for our disk, before we give up.
  std::chrono::milliseconds stall_limit{10000};
  // How long to wait for a lazy restore of the same VM to end.
  std::chrono::milliseconds restore_wait{300000};
  unsigned cpus = 2;              // threads that copy and compress
  std::optional<int> level;       // of zstd; see ImageWriterOptions
  bool deltas = false;            // --delta
  bool keep_huge_pages = true;    // each is copied as a whole while its writer waits
  // If memory is pinned, all is copied before the VM goes on: what writes unseen must
  // rest while it stands still.
  bool copy_pinned = false;
  std::optional<uint64_t> memory; // bytes of ours, see memory_budget.h
  uint64_t bytes_per_second = 0;  // of the image; 0: no limit
};

struct SnapshotSummary {
  std::string id;
  std::string file;
  double pause_ms = 0, total_ms = 0, attach_ms = 0;
  double copy_ms = 0;  // from the end of the pause until all is copied and compressed
  uint64_t total_pages = 0, zero_pages = 0, duplicate_pages = 0, stored_pages = 0;
  uint64_t image_bytes = 0;  // of a store: that it grew by
  uint64_t early_writes = 0;  // let through before the pause
  uint64_t write_faults = 0;
  uint64_t split_huge_pages = 0, mended_huge_pages = 0;
  double waited_ms = 0;  // all of them together
  double fault_p50_us = 0, fault_p99_us = 0, fault_max_us = 0;
};

enum class SnapshotPhase { waiting_for_restore, preparing, copying, committing };

// Called a few times a second while copying; null counters in other phases.
using SnapshotProgress = std::function<void(SnapshotPhase, const CaptureCounters*)>;

Result<SnapshotSummary> snapshot_vm(const MonitorAddress& monitor, const SnapshotOptions& options,
                                    const SnapshotProgress& progress);

// Ranges of addresses of the process, page aligned, in any order.
Result<SnapshotSummary> snapshot_process(pid_t pid, std::vector<RemoteRange> ranges,
                                         const SnapshotOptions& options,
                                         const SnapshotProgress& progress);

}  // namespace vmsnap
