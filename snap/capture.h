// Captures the memory of a running process into an image, as it was at one
// instant.
//
//   create()   nothing of the target is touched
//   begin()    the memory is registered with the userfaultfd and nearly all of
//              it write-protected; the target runs, and is let through
//   arm_again()  the same for what was written since; right before the pause
//   arm()      the instant; the target must stand still while this runs
//   finish()   the target runs; returns when every page is in the image
//
// Whatever fails, and when the object is destroyed, the userfaultfd is closed
// at once, which frees the target. Every call from the same thread.
//
// Threads: one answers write faults; `workers` sweep and compress, and between
// two pages let that one and the writers have the processor.
// Memory: the staging, 2 MiB a worker, 1 byte a page of the target, and what
// ImageWriter states.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "formats/error.h"
#include "formats/image_writer.h"
#include "snap/arming.h"
#include "snap/capture_state.h"
#include "snap/fault_handler.h"
#include "snap/pace.h"
#include "snap/sweep.h"
#include "snap/vmm/guest_memory.h"
#include "snap/vmm/process.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

struct CaptureOptions {
  unsigned workers = 2;
  uint64_t staging_bytes = 64 << 20;
  uint64_t bytes_per_second = 0;  // of the image; 0: no limit. Writers that wait are not held up.
  bool keep_huge_pages = true;  // copy each as a whole when it is written to; see fault_handler.h
  std::chrono::milliseconds stall_limit{10000};
  std::function<void()> heartbeat = [] {};  // often, while the target may wait for us
  std::function<void(const Uffd&)> watched = [](const Uffd&) {};  // all of it is registered
  std::function<void()> released = [] {};   // from now on it waits for us no more; any thread
};

// Features that capturing this memory needs of the userfaultfd.
uint64_t capture_features(const GuestMemory& memory);

class Capture {
 public:
  // All references must outlive the capture.
  static Result<std::unique_ptr<Capture>> create(const Process& process, const GuestMemory& memory,
                                                 Uffd uffd, ImageWriter& writer,
                                                 CaptureOptions options);
  ~Capture();

  // Some 30 ms per GiB. `on_progress` is called at least every few milliseconds;
  // an error it returns ends the capture.
  Status begin(const std::function<Status()>& on_progress);
  Status arm_again() { return arming_->again(); }
  Status arm();
  // After arm(): the copying begins. As soon as the target runs again, whatever else is
  // to be done then: until there are workers, only the staging takes what it writes to.
  void start();
  // After start(): returns when nothing is left that the target could change unseen. For
  // a target that is to stand still until then; `on_progress` as finish().
  Status wait_copied(const std::function<Status()>& on_progress);
  // After start(). `on_progress` is called some fifty times a second; an error it returns ends
  // the capture.
  Status finish(const std::function<Status()>& on_progress);

  const CaptureCounters& counters() const { return state_->counters; }
  // After finish(): the pages that were written first, in their order.
  const std::vector<uint64_t>& first_written() const { return state_->first_written; }

 private:
  Capture(ImageWriter& writer, CaptureOptions options, std::unique_ptr<CaptureState> state)
      : writer_(writer), options_(std::move(options)), state_(std::move(state)), sweep_(*state_),
        pace_(options_.bytes_per_second) {}
  Status arm_ahead(const std::function<Status()>& on_progress);
  Status watch(const MemoryPiece& piece);
  void mend_huge_pages();
  Status work();
  Status write(ImageWriter::Encoder& encoder, const Chunk& chunk);
  void let_go();
  void stop_threads();

  ImageWriter& writer_;
  CaptureOptions options_;
  std::unique_ptr<CaptureState> state_;
  std::atomic<size_t> watched_ = 0;  // pieces that are registered, from the first on
  std::unique_ptr<FaultHandler> faults_;
  std::unique_ptr<Arming> arming_;
  Sweep sweep_;
  Pace pace_;
  std::thread fault_thread_;
  std::vector<std::future<void>> workers_;
};

}  // namespace vmsnap
