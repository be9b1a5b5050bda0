#include "restore/guest_agent.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "formats/file.h"
#include "formats/interrupt.h"
#include "formats/json.h"
#include "restore/option_value.h"
#include "restore/qemu_options.h"
#include "snap/vmm/unix_socket.h"

namespace vmsnap {

namespace {

constexpr std::string_view channel_name = "org.qemu.guest_agent.0";
constexpr size_t longest_answer = 64 << 10;
using Clock = std::chrono::steady_clock;

class AgentLink {
 public:
  AgentLink(std::string path, Clock::time_point deadline)
      : path_(std::move(path)), deadline_(deadline) {}

  Status connect() {
    socket_ = VMSNAP_TRY(connect_to_socket(path_, SOCK_STREAM));
    return {};
  }

  // 0xff is no part of JSON: the agent forgets the half command that somebody
  // before us may have left it with. It answers that with an error.
  Status discard_former() const { return send("\xff"); }

  Status send_command(const nlohmann::json& command) const { return send(json_line(command) + "\n"); }

  // The next line that is a JSON object; what a former conversation left over
  // may be cut short.
  Result<nlohmann::json> next_object() {
    for (;;) {
      const size_t end = received_.find('\n');
      if (end == std::string::npos) {
        VMSNAP_CHECK(receive());
        continue;
      }
      // 0xff separates what belongs to us from what came before.
      std::string line = received_.substr(0, end);
      received_.erase(0, end + 1);
      if (const size_t start = line.rfind('\xff'); start != std::string::npos) line.erase(0, start + 1);
      nlohmann::json json = parse_json(line);
      if (json.is_object()) return json;
    }
  }

 private:
  Status send(const std::string& text) const {
    return write_all(socket_.get(), std::as_bytes(std::span(text)), path_);
  }

  Status receive() {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline_ - Clock::now()).count();
    if (left <= 0) return fail(ErrorCode::vm, "the guest agent at {} does not answer", path_);
    VMSNAP_CHECK(check_interrupted());
    pollfd readable = {socket_.get(), POLLIN, 0};
    if (::poll(&readable, 1, static_cast<int>(std::min<int64_t>(left, 200))) < 1) return {};
    char piece[4096];
    const ssize_t got = ::read(socket_.get(), piece, sizeof piece);
    if (got <= 0) return fail(ErrorCode::vm, "the guest agent's channel {} was closed", path_);
    received_.append(piece, static_cast<size_t>(got));
    if (received_.size() > longest_answer) {
      return fail(ErrorCode::vm, "what comes from {} is no guest agent", path_);
    }
    return {};
  }

  std::string path_;
  Clock::time_point deadline_;
  Fd socket_;
  std::string received_;
};

}  // namespace

std::optional<std::string> guest_agent_socket(std::span<const std::string> arguments) {
  const std::vector<QemuOption> options = parse_qemu_options(arguments);
  std::string chardev;
  for (const QemuOption& option : options) {
    if (option.name != "device" || !option.value) continue;
    const OptionValue device = OptionValue::parse(*option.value, "driver");
    if (device.get("name") == channel_name) chardev = device.get("chardev").value_or("");
  }
  if (chardev.empty()) return std::nullopt;
  for (const QemuOption& option : options) {
    if (option.name != "chardev" || !option.value) continue;
    const OptionValue value = OptionValue::parse(*option.value, "backend");
    if (value.get("id") == chardev && value.get("backend") == "socket") return value.get("path");
  }
  return std::nullopt;
}

Status set_guest_clock(const std::string& socket_path, std::chrono::milliseconds limit) {
  AgentLink agent(socket_path, Clock::now() + limit);
  VMSNAP_CHECK(agent.connect());
  VMSNAP_CHECK(agent.discard_former());
  const int64_t mark = Clock::now().time_since_epoch().count() & 0x7fffffff;
  VMSNAP_CHECK(
      agent.send_command({{"execute", "guest-sync-delimited"}, {"arguments", {{"id", mark}}}}));
  while (VMSNAP_TRY(agent.next_object()).value("return", nlohmann::json()) != mark) {
  }
  const int64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(
                          std::chrono::system_clock::now().time_since_epoch())
                          .count();
  VMSNAP_CHECK(agent.send_command({{"execute", "guest-set-time"}, {"arguments", {{"time", now}}}}));
  const nlohmann::json answer = VMSNAP_TRY(agent.next_object());
  const auto error = answer.find("error");
  if (error == answer.end()) return {};
  return fail(ErrorCode::vm,
              "the guest agent, which needs /sbin/hwclock in the guest, did not set the clock: {}",
              error->dump());
}

}  // namespace vmsnap
