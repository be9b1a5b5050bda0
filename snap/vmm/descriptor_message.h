// Sending descriptors along with bytes over a Unix socket (SCM_RIGHTS, unix(7)).
#pragma once

#include <sys/socket.h>
#include <sys/types.h>

#include <cstddef>
#include <span>
#include <vector>

#include "formats/file.h"

namespace vmsnap {

// One sendmsg(2) with at most eight descriptors: the bytes go as a whole or
// not at all, short of a full socket. Blocks as the socket does; raises no
// SIGPIPE. `flags` are more of sendmsg's (MSG_DONTWAIT). Returns what that does:
// bytes sent, or -1 and errno.
ssize_t send_with_descriptors(int socket, std::span<const std::byte> bytes,
                              std::span<const int> descriptors, int flags = 0);

struct Received {
  ssize_t bytes = -1;  // what recvmsg(2) returned; errno is its
  int flags = 0;       // MSG_TRUNC, MSG_CTRUNC
};

// One recvmsg(2), through signals: blocks as the socket does, or not with
// MSG_DONTWAIT in `flags`. What comes along is added to `descriptors`; beyond `most`
// (eight at most) the kernel closes it, and says MSG_CTRUNC.
Received receive_with_descriptors(int socket, std::span<std::byte> bytes, size_t most,
                                  std::vector<Fd>& descriptors, int flags = 0);

}  // namespace vmsnap
