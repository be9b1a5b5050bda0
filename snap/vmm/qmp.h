// A client of QEMU's machine protocol (QMP) over a Unix socket, or by way of libvirt.
//
// One thread at a time. Every call has a time limit; a VM that stalls, closes
// or answers something else than QMP is ErrorCode::vm, never a hang and never
// an abort. Replies are bounded (16 MiB).
//
// Source: docs/interop/qmp-spec.rst of QEMU.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <optional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "snap/vmm/monitor_address.h"

namespace vmsnap {

class Process;

class Qmp {
 public:
  // Whether SIGINT and its like end the wait for the greeting, with
  // ErrorCode::interrupted. Not where a VM is to be put right after one of them.
  enum class Signals { wait_through, heed };

  // Connects, reads the greeting, leaves negotiation mode.
  static Result<Qmp> connect(const MonitorAddress& address,
                             std::chrono::milliseconds limit = std::chrono::seconds(10),
                             Signals signals = Signals::wait_through);

  const MonitorAddress& address() const { return address_; }
  const std::string& name() const { return name_; }  // for messages
  int fd() const { return fd_.get(); }
  // The process at the other end (SO_PEERCRED): who called listen(2), which
  // is QEMU unless somebody passed it the socket. Of a libvirt domain, see
  // find_process_behind().
  Result<pid_t> peer_pid();
  // Whether it is this one.
  Result<bool> is_behind_it(const Process& process);

  // Runs a command and returns its "return" value. A QMP error answer is
  // ErrorCode::vm with its description. Descriptors are passed along
  // (SCM_RIGHTS), as getfd and add-fd want it.
  Result<nlohmann::json> execute(const std::string& command,
                                 nlohmann::json arguments = nlohmann::json::object(),
                                 std::vector<int> descriptors = {});
  // human-monitor-command: its text.
  Result<std::string> human(const std::string& command_line);

  // STOP and RESUME events in what was read. QEMU sends them before the answer to what
  // caused them, and RESUME before any virtual CPU runs.
  uint64_t stops() const { return stops_; }
  uint64_t resumes() const { return resumes_; }
  // Whether they may arrive after such an answer, though in their order: libvirt
  // passes them on as it likes.
  bool has_late_events() const { return address_.is_libvirt(); }
  // For late ones. Events have the time at which QEMU sent them, by the clock that
  // unix_us() reads; only those count here that were sent after mark().
  static int64_t unix_us();
  void mark();
  bool stopped_since_mark() const { return stopped_since_mark_; }
  std::optional<int64_t> first_resume_since_mark() const { return first_resume_since_mark_; }
  // Reads what has arrived; and what arrives within `limit`, until `enough`.
  Status read_events(std::chrono::milliseconds limit = {},
                     const std::function<bool()>& enough = [] { return false; });

  void set_limit(std::chrono::milliseconds limit) { limit_ = limit; }
  void close() { fd_.reset(); }

 private:
  Result<nlohmann::json> read_message(std::chrono::steady_clock::time_point deadline);
  void note_event(const nlohmann::json& message);

  Fd fd_;
  MonitorAddress address_;
  std::string name_;
  std::string received_;  // bytes after the last whole line
  std::chrono::milliseconds limit_{10000};
  uint64_t last_id_ = 0;
  uint64_t stops_ = 0, resumes_ = 0;
  std::optional<int64_t> marked_;
  bool stopped_since_mark_ = false;
  std::optional<int64_t> first_resume_since_mark_;
  Signals signals_ = Signals::wait_through;
};

// A text in an object of an answer; empty if it is not there, or is none.
std::string text_of(const nlohmann::json& object, const char* key);
// The same of a boolean.
std::optional<bool> flag_of(const nlohmann::json& object, const char* key);

}  // namespace vmsnap
