#include "snap/vmm/qmp.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "formats/interrupt.h"
#include "formats/json.h"
#include "snap/vmm/descriptor_message.h"
#include "snap/vmm/libvirt_monitor.h"
#include "snap/vmm/process.h"
#include "snap/vmm/unix_socket.h"

namespace vmsnap {

namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::json;

constexpr size_t max_reply = 16 << 20;
constexpr const char* one_client_at_a_time =
    "Another program may hold this monitor. If it is libvirt, use --libvirt; else give the VM a "
    "second -qmp socket.";

tl::unexpected<Error> bad(const std::string& name, std::string what, std::string remedy) {
  return tl::unexpected(
      Error(ErrorCode::vm, fmt::format("{}: {}", name, what)).with_remedy(std::move(remedy)));
}

Result<Fd> connect_to_monitor(const std::string& path, std::chrono::milliseconds limit,
                              Qmp::Signals signals) {
  Result<Fd> connected = connect_to_socket(path, SOCK_STREAM, limit, [&]() -> Status {
    return signals == Qmp::Signals::heed ? check_interrupted() : Status();
  });
  if (connected || connected.error().os_errno() == 0) return connected;
  const int why = connected.error().os_errno();
  const auto error = [&](ErrorCode code, const char* remedy) {
    const std::string what = fmt::format("cannot connect to QMP socket {}", path);
    return tl::unexpected(Error::from_errno(why, what, code).with_remedy(remedy));
  };
  if (why == EACCES || why == EPERM) return error(ErrorCode::privilege, "Run vmsnap as root.");
  if (why == EAGAIN) return error(ErrorCode::vm, one_client_at_a_time);  // others wait for it, too
  return error(ErrorCode::vm, "Start the VM with -qmp unix:PATH,server=on,wait=off and give that PATH.");
}

// True when readable before the deadline.
Result<bool> wait_readable(int fd, Clock::time_point deadline, Qmp::Signals signals) {
  // A signal may come just before poll(2), or to another thread.
  constexpr int64_t slice_ms = 200;
  for (;;) {
    if (signals == Qmp::Signals::heed) VMSNAP_CHECK(check_interrupted());
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0) return false;
    pollfd poller = {fd, POLLIN, 0};
    const int ready = ::poll(&poller, 1, static_cast<int>(std::min<int64_t>(left, slice_ms)));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return fail_errno(errno, "poll failed");
  }
}

// One sendmsg, so that a command is never sent by halves: what a successor on
// the same socket writes then starts a new command.
Status send_line(int fd, const std::string& name, const std::string& line,
                 const std::vector<int>& descriptors) {
  const ssize_t sent = send_with_descriptors(fd, std::as_bytes(std::span(line)), descriptors);
  if (sent < 0) {
    return tl::unexpected(
        Error::from_errno(errno, fmt::format("{}: cannot send", name), ErrorCode::vm));
  }
  if (static_cast<size_t>(sent) != line.size()) {
    return bad(name, "the VM does not read its monitor", "See whether the VM hangs.");
  }
  return {};
}

}  // namespace

Result<Qmp> Qmp::connect(const MonitorAddress& address, std::chrono::milliseconds limit,
                         Signals signals) {
  Qmp qmp;
  qmp.signals_ = signals;
  qmp.address_ = address;
  qmp.name_ = address.describe();
  qmp.limit_ = limit;
  qmp.fd_ = VMSNAP_TRY(address.is_libvirt() ? start_libvirt_monitor(address)
                                            : connect_to_monitor(address.socket, limit, signals));
  // A monitor talks to one client at a time; the greeting of a second one
  // waits until the first has gone.
  const auto greeting_end = Clock::now() + limit;
  auto greeting = qmp.read_message(greeting_end);
  while (greeting && greeting->contains("event")) greeting = qmp.read_message(greeting_end);
  if (!greeting && greeting.error().code() == ErrorCode::interrupted) {
    return tl::unexpected(std::move(greeting).error());
  }
  if (!greeting) {
    return tl::unexpected(std::move(greeting).error().with_remedy(
        address.is_libvirt() ? "See whether libvirt answers, and which domains run: virsh list."
                             : one_client_at_a_time));
  }
  if (address.is_libvirt() && greeting->contains("error")) {
    return bad(qmp.name_, text_of((*greeting)["error"], "desc"),
               "See which domains run: virsh list. --connect gives another libvirt than the system's.");
  }
  if (!greeting->contains("QMP")) {
    return bad(qmp.name_, "the other end does not speak QMP",
               "Give the path of a -qmp socket, not of a -monitor or -serial one.");
  }
  VMSNAP_TRY(qmp.execute("qmp_capabilities"));
  // A command that has begun is waited for: what it did is to be known.
  qmp.signals_ = Signals::wait_through;
  return qmp;
}

Result<pid_t> Qmp::peer_pid() {
  if (address_.is_libvirt()) return find_process_behind(*this);
  ucred peer = {};
  socklen_t size = sizeof peer;
  if (::getsockopt(fd(), SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0) {
    return fail_errno(errno, "cannot tell who is behind {}", name_);
  }
  if (peer.pid <= 0) {
    return bad(name_, "the process behind it is not visible from here",
               "Run vmsnap in the same PID namespace as the VM.");
  }
  return peer.pid;
}

Result<bool> Qmp::is_behind_it(const Process& process) {
  if (address_.is_libvirt()) return is_behind(process, *this);
  return VMSNAP_TRY(peer_pid()) == process.pid();
}

Result<Json> Qmp::read_message(Clock::time_point deadline) {
  for (;;) {
    const size_t end = received_.find('\n');
    if (end != std::string::npos) {
      const std::string line = received_.substr(0, end);
      received_.erase(0, end + 1);
      if (line.find_first_not_of(" \r\t") == std::string::npos) continue;
      Json message = parse_json(line);
      if (!message.is_object()) {
        return bad(name_, "the answer is not QMP", "Give the path of a -qmp socket.");
      }
      return message;
    }
    if (received_.size() > max_reply) {
      return bad(name_, "the answer has no end", "Give the path of a -qmp socket.");
    }
    if (!VMSNAP_TRY(wait_readable(fd(), deadline, signals_))) {
      return bad(name_, "no answer in time", "See whether the VM hangs.");
    }
    char buffer[65536];
    const ssize_t got = ::recv(fd(), buffer, sizeof buffer, 0);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got <= 0) return bad(name_, "the VM closed the connection", "See whether the VM has ended.");
    received_.append(buffer, static_cast<size_t>(got));
  }
}

Result<Json> Qmp::execute(const std::string& command, Json arguments, std::vector<int> descriptors) {
  // The id tells an answer from a late one to an earlier command.
  const uint64_t id = ++last_id_;
  Json request = {{"execute", command}, {"id", id}};
  if (!arguments.empty()) request["arguments"] = std::move(arguments);
  VMSNAP_CHECK(send_line(fd(), name_, json_line(request) + "\n", descriptors));
  const auto deadline = Clock::now() + limit_;
  for (;;) {
    Json message = VMSNAP_TRY(read_message(deadline));
    if (message.contains("event")) {
      note_event(message);
      continue;
    }
    if (message.value("id", Json()) != id) {
      if (message.contains("id") || message.contains("return")) continue;
    }
    if (message.contains("return")) return std::move(message["return"]);
    if (message.contains("error") && message["error"].is_object()) {
      const Json& desc = message["error"]["desc"];
      return bad(name_,
                 fmt::format("{} failed: {}", command,
                             desc.is_string() ? desc.get<std::string>() : "no description"),
                 "");
    }
    return bad(name_, "the answer is not QMP", "Give the path of a -qmp socket.");
  }
}

namespace {

int64_t time_of(const Json& event) {
  const auto time = event.find("timestamp");
  if (time == event.end() || !time->is_object()) return 0;
  const auto part = [&](const char* key) -> int64_t {
    const auto found = time->find(key);
    return found != time->end() && found->is_number_integer() ? found->get<int64_t>() : 0;
  };
  return part("seconds") * 1'000'000 + part("microseconds");
}

}  // namespace

void Qmp::note_event(const Json& message) {
  const bool is_stop = message["event"] == "STOP", is_resume = message["event"] == "RESUME";
  stops_ += is_stop;
  resumes_ += is_resume;
  if (!marked_ || (!is_stop && !is_resume)) return;
  const int64_t when = time_of(message);
  if (when < *marked_) return;
  if (is_stop) stopped_since_mark_ = true;
  if (is_resume && !first_resume_since_mark_) first_resume_since_mark_ = when;
}

int64_t Qmp::unix_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

void Qmp::mark() {
  marked_ = unix_us();
  stopped_since_mark_ = false;
  first_resume_since_mark_.reset();
}

Status Qmp::read_events(std::chrono::milliseconds limit, const std::function<bool()>& enough) {
  const auto end = Clock::now() + limit;
  const auto has_arrived = [&] {
    if (received_.find('\n') != std::string::npos) return true;
    for (;;) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now()).count();
      pollfd poller = {fd(), POLLIN, 0};
      const int ready = ::poll(&poller, 1, std::max(0, static_cast<int>(left)));
      if (ready >= 0 || errno != EINTR) return ready > 0;
    }
  };
  while (!enough() && has_arrived()) {
    const Json message = VMSNAP_TRY(read_message(Clock::now() + limit_));
    if (message.contains("event")) note_event(message);
  }
  return {};
}

Result<std::string> Qmp::human(const std::string& command_line) {
  const Json answer =
      VMSNAP_TRY(execute("human-monitor-command", {{"command-line", command_line}}));
  if (!answer.is_string()) return bad(name_, "'" + command_line + "' gave no text", "");
  // The human monitor ends its lines as a terminal wants them, with CR LF.
  std::string text = answer.get<std::string>();
  std::erase(text, '\r');
  return text;
}

std::string text_of(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
}

std::optional<bool> flag_of(const Json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_boolean()) return std::nullopt;
  return found->get<bool>();
}

}  // namespace vmsnap
