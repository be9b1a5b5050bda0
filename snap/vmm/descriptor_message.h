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

// Takes over every descriptor that came with a message received by recvmsg(2).
void collect_descriptors(msghdr& header, std::vector<Fd>& descriptors);

}  // namespace vmsnap
