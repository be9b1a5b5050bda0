#include "restore/farm/farm_link.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "formats/json.h"
#include "snap/vmm/descriptor_message.h"
#include "snap/vmm/unix_socket.h"

namespace vmsnap {

namespace {

constexpr size_t max_message = 128 << 10;
constexpr size_t max_link_descriptors = 8;

}  // namespace

Status send_message(int socket, const nlohmann::json& json, const std::vector<int>& descriptors) {
  const std::string text =
      json_line(json);
  if (text.size() > max_message) return fail(ErrorCode::usage, "a message is too long");
  const ssize_t sent = send_with_descriptors(socket, std::as_bytes(std::span(text)), descriptors,
                                             MSG_DONTWAIT);
  if (sent == static_cast<ssize_t>(text.size())) return {};
  if (sent < 0 && errno == EAGAIN) {
    return fail(ErrorCode::vm, "the other process of the farm does not read what it is sent");
  }
  return fail(ErrorCode::vm, "the other process of the farm is gone");
}

Result<std::optional<LinkMessage>> receive_message(int socket, std::chrono::milliseconds limit) {
  pollfd readable = {socket, POLLIN, 0};
  int ready;
  do {
    ready = ::poll(&readable, 1, static_cast<int>(limit.count()));
  } while (ready < 0 && errno == EINTR);
  if (ready == 0) return fail(ErrorCode::vm, "the farm's page server does not answer");
  std::vector<char> text(max_message);
  LinkMessage message;
  const auto [got, flags] =
      receive_with_descriptors(socket, std::as_writable_bytes(std::span(text)),
                               max_link_descriptors, message.descriptors);
  if (got <= 0) return std::nullopt;  // ECONNRESET is an end, too
  message.json = parse_json({text.data(), static_cast<size_t>(got)});
  if ((flags & (MSG_TRUNC | MSG_CTRUNC)) || !message.json.is_object()) {
    return fail(ErrorCode::damaged, "what came over the farm's socket is no message of ours");
  }
  return message;
}

Result<LinkMessage> ask(int socket, const nlohmann::json& request,
                        const std::vector<int>& descriptors, std::chrono::milliseconds limit) {
  VMSNAP_CHECK(send_message(socket, request, descriptors));
  std::optional<LinkMessage> answer = VMSNAP_TRY(receive_message(socket, limit));
  if (!answer) return fail(ErrorCode::vm, "the farm's page server is gone");
  const auto error = answer->json.find("error");
  if (error != answer->json.end()) {
    return fail(ErrorCode::vm, "{}", error->is_string() ? error->get<std::string>() : "it failed");
  }
  return std::move(*answer);
}

Result<Fd> listen_for_messages(const std::string& path) {
  // Whoever holds the lock of the directory may replace what a dead one left.
  ::unlink(path.c_str());
  auto listener = listen_on_socket(path, SOCK_SEQPACKET, 64);
  if (listener || listener.error().code() != ErrorCode::usage) return listener;
  return tl::unexpected(std::move(listener).error().with_remedy("Choose a shorter --run-dir."));
}

Result<Fd> connect_for_messages(const std::string& path) {
  auto connected = connect_to_socket(path, SOCK_SEQPACKET);
  if (connected) return connected;
  return fail(ErrorCode::vm, "nobody listens on {}", path);
}

Result<MessagePair> message_pair() {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) {
    return fail_errno(errno, "cannot make a socket pair");
  }
  return MessagePair{Fd(ends[0]), Fd(ends[1])};
}

}  // namespace vmsnap
