#include "snap/vmm/fill_request.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>

namespace vmsnap {

namespace {

constexpr int answer_limit_ms = 2000;

struct AbstractAddress {
  sockaddr_un address = {};
  socklen_t length = 0;
};

AbstractAddress address_of(const Process& vm) {
  const std::string name = fmt::format("vmsnap-fill-{}-{}", vm.pid(), vm.start_time());
  AbstractAddress result;
  result.address.sun_family = AF_UNIX;
  // The first byte, 0, makes it abstract.
  std::memcpy(result.address.sun_path + 1, name.data(), name.size());
  result.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return result;
}

// Another user could take the name first, or ask.
bool may_talk_to(int socket) {
  ucred peer = {};
  socklen_t size = sizeof peer;
  return ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 &&
         (peer.uid == 0 || peer.uid == ::geteuid());
}

}  // namespace

FillAnswer ask_for_fill(const Process& vm) {
  // Where others wait already, this is not to wait behind them: connect(2) would.
  const Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const AbstractAddress to = address_of(vm);
  if (!socket ||
      ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&to.address), to.length) < 0 ||
      !may_talk_to(socket.get())) {
    return FillAnswer::nobody;
  }
  pollfd answered = {socket.get(), POLLIN, 0};
  char word;
  if (::poll(&answered, 1, answer_limit_ms) != 1 || ::recv(socket.get(), &word, 1, 0) != 1) {
    return FillAnswer::nobody;
  }
  const auto answer = static_cast<FillAnswer>(word);
  return answer == FillAnswer::comes || answer == FillAnswer::parked ? answer : FillAnswer::nobody;
}

Result<FillRequests> FillRequests::listen(const Process& vm) {
  FillRequests requests;
  requests.listener_ = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!requests.listener_) return fail_errno(errno, "cannot make a socket");
  const AbstractAddress at = address_of(vm);
  if (::bind(requests.fd(), reinterpret_cast<const sockaddr*>(&at.address), at.length) < 0 ||
      ::listen(requests.fd(), 4) < 0) {
    return fail_errno(errno, "cannot listen to snapshots of {}", vm.describe());
  }
  return requests;
}

bool FillRequests::answer(FillAnswer answer) {
  bool any = false;
  for (;;) {
    const Fd asking(::accept4(fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!asking) return any;
    if (!may_talk_to(asking.get())) continue;
    const char word = static_cast<char>(answer);
    (void)!::send(asking.get(), &word, 1, MSG_NOSIGNAL);
    any = true;
  }
}

}  // namespace vmsnap
