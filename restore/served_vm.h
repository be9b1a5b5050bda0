// A restored VM together with its page server: what a restore has at hand once
// the VM was started, and what a successor gets back from the run directory.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <thread>

#include "formats/command.h"
#include "formats/image_reader.h"
#include "restore/page_marks.h"
#include "restore/page_server.h"
#include "restore/run_dir.h"
#include "restore/working_set_recorder.h"
#include "snap/vmm/fill_request.h"
#include "snap/vmm/process.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

struct ServedVm {
  RunDir dir;
  RestoreRecord record;
  std::unique_ptr<ImageReader> image;
  Process process;
  Uffd uffd;
  PageMarks marks;
  std::unique_ptr<WorkingSetRecorder> recorder = nullptr;  // if the record says so
  Fd control = {};  // DIR/control, while it is parked
  FillRequests requests = {};  // of snapshots
};

// The features that a restore asks of userfaultfd(2) here: page_server_features,
// and poison where the kernel has it.
Result<uint64_t> wanted_features();

// A page server in a thread of its own. One thread uses this.
class Serving {
 public:
  // As the record says. `vm` must outlive this.
  static std::unique_ptr<Serving> start(ServedVm& vm);
  ~Serving();  // stops it

  // Nothing is loaded ahead before this.
  void begin_fill() { server_->begin_fill(); }
  bool ended() const { return ended_.load(); }
  // Makes it stop, if it has not ended by itself, and waits for it.
  Result<ServeEnd> stop();
  // Waits until it has ended by itself.
  Result<ServeEnd> wait();
  PageServerCounters counters() const { return server_->counters(); }

 private:
  Serving() = default;

  std::unique_ptr<PageServer> server_;
  std::optional<Result<ServeEnd>> end_;
  std::atomic<bool> ended_ = false;
  std::thread thread_;
};

struct ServeManner {
  bool detach = false;  // leave the rest to a process in the background
  bool json = false;
  std::chrono::steady_clock::time_point started;  // of the command
};

// From "the guest may run" to "the VM is on its own": waits with `serving`,
// shows progress, prints the summary, lets go of the VM. In the background if
// asked, or after SIGINT, SIGTERM or SIGHUP: then a child process goes on
// serving (its log is DIR/vmsnap.log) and this returns in the parent, with
// ErrorCode::interrupted if it was a signal. ErrorCode::poisoned when pages
// could not be read back, ErrorCode::vm when the VM ended first; if the record
// wants less than all pages loaded, its end is what is waited for. A recorded
// working set is written in any case. A snapshot of the VM that asks for all
// pages (fill_request.h) changes what is loaded to `all`.
Status serve_to_end(ServedVm& vm, std::unique_ptr<Serving> serving, const ServeManner& manner,
                    CommandContext& context);

// Goes on serving in a child process, which also lets go of the VM at the end
// (its log is DIR/vmsnap.log); returns its number when it serves and the record has
// it, ErrorCode::io when it ended before. The guest's faults wait for the
// milliseconds in between. A VM whose phase is `parked` gets its pages by
// faults alone until a byte comes through vm.control; then its phase is
// `running`, and the rest is loaded. Must be called while the process has one
// thread.
Result<pid_t> serve_in_background(ServedVm& vm);

// Makes and opens DIR/control, for serve_in_background() of a parked VM.
Status open_control(ServedVm& vm);

// What --json prints; pages of 4 KiB.
nlohmann::json to_json(const PageServerCounters& counters);

}  // namespace vmsnap
