// A client of QEMU's machine protocol (QMP) over a Unix socket.
//
// One thread at a time. Every call has a time limit; a VM that stalls, closes
// or answers something else than QMP is ErrorCode::vm, never a hang and never
// an abort. Replies are bounded (16 MiB).
//
// Source: docs/interop/qmp-spec.rst of QEMU.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <optional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"

namespace vmsnap {

class Qmp {
 public:
  // Whether SIGINT and its like end the wait for the greeting, with
  // ErrorCode::interrupted. Not where a VM is to be put right after one of them.
  enum class Signals { wait_through, heed };

  // Connects, reads the greeting, leaves negotiation mode.
  static Result<Qmp> connect(const std::string& socket_path,
                             std::chrono::milliseconds limit = std::chrono::seconds(10),
                             Signals signals = Signals::wait_through);

  const std::string& socket_path() const { return path_; }
  int fd() const { return fd_.get(); }
  // The process at the other end (SO_PEERCRED): who called listen(2), which
  // is QEMU unless somebody passed it the socket.
  Result<pid_t> peer_pid() const;

  // Runs a command and returns its "return" value. A QMP error answer is
  // ErrorCode::vm with its description. Descriptors are passed along
  // (SCM_RIGHTS), as getfd and add-fd want it.
  Result<nlohmann::json> execute(const std::string& command,
                                 nlohmann::json arguments = nlohmann::json::object(),
                                 std::vector<int> descriptors = {});
  // human-monitor-command: its text.
  Result<std::string> human(const std::string& command_line);

  // RESUME events so far: of the whole answers and, if asked to look, of what else
  // has arrived. QEMU sends the event before any virtual CPU runs.
  Result<uint64_t> look_for_resumes();
  uint64_t stops() const { return stops_; }  // STOP events in what was read

  void set_limit(std::chrono::milliseconds limit) { limit_ = limit; }
  void close() { fd_.reset(); }

 private:
  Result<nlohmann::json> read_message(std::chrono::steady_clock::time_point deadline);
  void note_event(const nlohmann::json& message);

  Fd fd_;
  std::string path_;
  std::string received_;  // bytes after the last whole line
  std::chrono::milliseconds limit_{10000};
  uint64_t last_id_ = 0;
  uint64_t stops_ = 0, resumes_ = 0;
  Signals signals_ = Signals::wait_through;
};

// A text in an object of an answer; empty if it is not there, or is none.
std::string text_of(const nlohmann::json& object, const char* key);
// The same of a boolean.
std::optional<bool> flag_of(const nlohmann::json& object, const char* key);

}  // namespace vmsnap
