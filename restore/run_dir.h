// The directory of one restored VM, and what is written down there so that
// another page server can take over.
//
//   restore.json   who is served from what, how far it got (RestoreRecord)
//   pages          two bits a page: given, given back (page_marks.h)
//   control        FIFO: where the server of a parked VM is told to unpark it
//   lock           held by the living page server (fcntl(2), open file
//                  description), whatever process number it has
//   qmp.sock qemu.pid qemu.log vmsnap.log serialN.log ...
//
// What is read back from restore.json is checked before it is believed: the
// file may be another version's, or edited.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "formats/store/image_argument.h"
#include "restore/page_source.h"
#include "snap/vmm/process.h"

namespace vmsnap {

// How far a restore got. What a successor does about it is in reattach.h.
enum class RestorePhase {
  starting,    // nothing of the VM is there
  launched,    // QEMU was started and waits
  registered,  // its memory is watched
  loading,     // its device state is on its way
  loaded,      // complete but for pages; it may run from here on
  running,     // it was told to run
  parking,     // a running VM's memory is being handed back to the host
  parked,      // it was, and comes when it is touched
  filled,      // all pages are there, its memory is no longer watched
  complete,    // and it is on its own
  ended,       // it died before
};
std::string_view phase_name(RestorePhase phase);

struct RestoreRecord {
  RestorePhase phase = RestorePhase::starting;
  std::string image;  // absolute path
  std::string image_id;
  std::string qmp;          // socket path
  pid_t pid = 0;            // of QEMU; 0: none yet
  uint64_t start_time = 0;  // proc(5) stat field 22: with pid, names the process
  int uffd = -1;            // descriptor number in QEMU
  pid_t server_pid = 0;     // of the page server, for people
  bool resume = true;       // the VM is to run when it is loaded, or unparked
  bool clone = false;       // served by the farm in the directory above
  Prefetch prefetch = Prefetch::all;
  bool record_working_set = false;  // in the order of its faults, beside the image
  bool of_parked_vm = false;  // it was not restored here: it lived before, elsewhere
  double ready_ms = 0;      // from the command to the running guest
  std::vector<ServedRange> ranges;
  nlohmann::json counters = nlohmann::json::object();  // for people
};

nlohmann::json to_json(const RestoreRecord& record);
// ErrorCode::damaged names the field that is wrong. Ranges come back page
// aligned, not empty, without overflow and without overlap.
Result<RestoreRecord> restore_record_from_json(const nlohmann::json& json);

// Of the VM whose run directory that is. ErrorCode::damaged as above.
Result<RestoreRecord> read_restore_record(const std::string& run_dir);
// ErrorCode::damaged unless the ranges are all of an image of so many pages, each once.
Status check_ranges(const RestoreRecord& record, uint64_t image_pages);
// The image that a VM was restored from, by its recorded path and id.
// ErrorCode::damaged when another one is there now.
Result<std::unique_ptr<ImageReader>> open_recorded_image(const std::string& path,
                                                         const std::string& id,
                                                         const KeySource& key);
// The process of the record, if it is still that one; else ErrorCode::vm.
Result<Process> find_process(const RestoreRecord& record);

// Makes `path` (mode 0700) unless it is there; empty: a new directory under
// /run/vmsnap, or $XDG_RUNTIME_DIR/vmsnap for others than root. Returns its
// absolute path; `made` says whether it was made.
Result<std::string> make_run_directory(const std::string& path, bool* made = nullptr);
// The directory of the new ones, made if it is not there.
Result<std::string> default_run_directories();

// For who takes over: a page server that was killed a moment ago holds its lock
// until the kernel has taken it apart.
inline constexpr std::chrono::seconds takeover_patience{2};
// The lock of a run directory; ErrorCode::exists while a page server is at work
// there, and is after `patience`, which a signal cuts short. It is held until the
// last copy of the descriptor is closed.
Result<Fd> lock_run_directory(const std::string& path, std::chrono::milliseconds patience = {});

class RunDir {
 public:
  // make_run_directory(), and locks it. ErrorCode::exists when a VM that was
  // restored there still runs, one that was parked there is not whole again, or
  // a page server has it.
  static Result<RunDir> create(const std::string& path);
  // An existing one, for taking over. ErrorCode::exists when a page server has it,
  // still after `patience`; the errors of read_restore_record(), and then nothing is
  // made there.
  static Result<RunDir> open(const std::string& path, std::chrono::milliseconds patience = {});

  const std::string& path() const { return path_; }
  std::string file(std::string_view name) const { return path_ + "/" + std::string(name); }

  // restore.json, replaced as a whole.
  Status write(const RestoreRecord& record) const;
  Result<RestoreRecord> read() const { return read_restore_record(path_); }

  // Removes what create() and a failed restore made: the directory if it was
  // ours, else our files in it, but for the logs.
  void undo();
  // In a child process: closes its share of the lock, which our own keeps.
  void forget_lock() { lock_.reset(); }
  // Removes what only a page server needs.
  void finish();

 private:
  RunDir() = default;
  Status take_lock(std::chrono::milliseconds patience = {});

  std::string path_;
  bool made_ = false;
  Fd lock_;
};

}  // namespace vmsnap
