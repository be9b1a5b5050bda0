// Unix sockets with a name in the file system (unix(7)).
//
// Paths that do not fit into an address are ErrorCode::usage. Descriptors come
// close-on-exec.
#pragma once

#include <sys/un.h>

#include <chrono>
#include <functional>
#include <string>

#include "formats/error.h"
#include "formats/file.h"

namespace vmsnap {

Result<sockaddr_un> socket_address(const std::string& path);

// `type` is SOCK_STREAM or SOCK_SEQPACKET, here and below; for listening or'ed with
// SOCK_NONBLOCK if wished. The error has connect(2)'s errno: EAGAIN when as many are
// waiting as the socket lets, and one of them is not taken within `limit`. While it has
// to wait, `go_on` is asked every few milliseconds; its error ends the wait.
Result<Fd> connect_to_socket(const std::string& path, int type,
                             std::chrono::milliseconds limit = std::chrono::seconds(10),
                             const std::function<Status()>& go_on = [] { return Status(); });

// Makes the socket, mode 0600 from its first moment, and listens: once the file
// is there, connecting to it works. Nothing may be at `path`, whose length may be
// nine bytes less than an address holds.
Result<Fd> listen_on_socket(const std::string& path, int type, int backlog);

}  // namespace vmsnap
