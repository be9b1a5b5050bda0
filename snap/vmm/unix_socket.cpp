#include "snap/vmm/unix_socket.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <thread>

#include <fmt/format.h>

namespace vmsnap {

namespace {

Result<Fd> new_socket(int type) {
  Fd socket(::socket(AF_UNIX, type | SOCK_CLOEXEC, 0));
  if (!socket) return fail_errno(errno, "cannot make a socket");
  return socket;
}

tl::unexpected<Error> too_long(const std::string& path, size_t most) {
  return fail(ErrorCode::usage, "the socket path {} is too long (at most {} bytes)", path, most);
}

}  // namespace

Result<sockaddr_un> socket_address(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return too_long(path, sizeof address.sun_path - 1);
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

Result<Fd> connect_to_socket(const std::string& path, int type, std::chrono::milliseconds limit,
                             const std::function<Status()>& go_on) {
  const sockaddr_un address = VMSNAP_TRY(socket_address(path));
  Fd socket = VMSNAP_TRY(new_socket(type | SOCK_NONBLOCK));
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) < 0) {
    // EAGAIN: as many as it lets wait are waiting (a monitor takes one client at a time).
    const int why = errno;
    if ((why != EAGAIN && why != EINTR) || std::chrono::steady_clock::now() >= deadline) {
      return fail_errno(why, "cannot connect to {}", path);
    }
    VMSNAP_CHECK(go_on());
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  VMSNAP_CHECK(set_nonblocking(socket.get(), false, "a socket"));
  return socket;
}

Result<Fd> listen_on_socket(const std::string& path, int type, int backlog) {
  // Who waits for the file and finds one that nobody listens on yet is refused:
  // it gets its name when all is ready.
  const std::string suffix = fmt::format(".{:08x}", std::random_device()());
  const size_t most = sizeof sockaddr_un::sun_path - 1 - suffix.size();
  if (path.size() > most) return too_long(path, most);
  const std::string unready = path + suffix;
  const sockaddr_un address = VMSNAP_TRY(socket_address(unready));
  Fd socket = VMSNAP_TRY(new_socket(type));
  // The file must never be there for others, not even for a moment.
  const mode_t before = ::umask(0177);
  const int bound =
      ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  const int why = errno;
  ::umask(before);
  if (bound < 0) return fail_errno(why, "cannot make the socket {}", path);
  const bool listens = ::listen(socket.get(), backlog) == 0 && ::link(unready.c_str(), path.c_str()) == 0;
  const int why_not = errno;
  ::unlink(unready.c_str());
  if (!listens) return fail_errno(why_not, "cannot listen on {}", path);
  return socket;
}

}  // namespace vmsnap
