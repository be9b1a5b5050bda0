#include "restore/farm/farm_link.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "snap/vmm/descriptor_message.h"

namespace vmsnap {

namespace {

constexpr size_t max_message = 128 << 10;
constexpr size_t max_link_descriptors = 8;

Result<sockaddr_un> link_address(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("the socket path {} is too long (at most {} bytes)",
                                            path, sizeof address.sun_path - 1))
            .with_remedy("Choose a shorter --run-dir."));
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

Result<Fd> message_socket() {
  Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!socket) return fail_errno(errno, "cannot make a socket");
  return socket;
}

}  // namespace

Status send_message(int socket, const nlohmann::json& json, const std::vector<int>& descriptors) {
  const std::string text =
      json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (text.size() > max_message) return fail(ErrorCode::usage, "a message is too long");
  if (send_with_descriptors(socket, std::as_bytes(std::span(text)), descriptors) ==
      static_cast<ssize_t>(text.size())) {
    return {};
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
  alignas(cmsghdr) char control[CMSG_SPACE(max_link_descriptors * sizeof(int))];
  iovec bytes = {text.data(), text.size()};
  msghdr header = {};
  header.msg_iov = &bytes;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  ssize_t got;
  do {
    got = ::recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
  } while (got < 0 && errno == EINTR);
  if (got <= 0) return std::nullopt;  // ECONNRESET is an end, too
  LinkMessage message;
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    for (size_t i = 0; i < (part->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
      message.descriptors.emplace_back(fd);
    }
  }
  message.json = nlohmann::json::parse(text.data(), text.data() + got, nullptr, false);
  if ((header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) || !message.json.is_object()) {
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
  const sockaddr_un address = VMSNAP_TRY(link_address(path));
  Fd socket = VMSNAP_TRY(message_socket());
  // Whoever holds the lock of the directory may replace what a dead one left.
  ::unlink(path.c_str());
  const mode_t before = ::umask(0177);
  const int bound =
      ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  const int why = errno;
  ::umask(before);
  if (bound < 0) return fail_errno(why, "cannot make the socket {}", path);
  if (::listen(socket.get(), 64) < 0) return fail_errno(errno, "cannot listen on {}", path);
  return socket;
}

Result<Fd> connect_for_messages(const std::string& path) {
  const sockaddr_un address = VMSNAP_TRY(link_address(path));
  Fd socket = VMSNAP_TRY(message_socket());
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
    return socket;
  }
  return fail(ErrorCode::vm, "nobody listens on {}", path);
}

}  // namespace vmsnap
