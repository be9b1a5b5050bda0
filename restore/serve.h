// `vmsnap serve`: pages of an image for VMMs that bring their userfaultfd to a
// socket (firecracker.h).
//
// Each connection gets a thread and a page server of its own; a bad handshake
// or a VMM that dies touches no other. The memory is filled in the background
// and stays watched until the VMM goes, because pages that a balloon gave back
// are answered with zeros. A VMM's end is seen by its process (SO_PEERPIDFD,
// Linux 6.5, or the pid of SO_PEERCRED), or by asking its address space once a
// second where the process cannot be seen.
//
// Once it listens and the image is open it gives up all privileges but its user
// id (privileges.h).
#pragma once

#include <string>

#include "formats/command.h"
#include "formats/store/image_argument.h"
#include "restore/page_source.h"

namespace vmsnap {

struct ServeOptions {
  ImageArgument image;
  std::string socket;  // path; made with mode 0600, removed at the end
  Prefetch prefetch = Prefetch::all;
  bool write_protect = false;  // pages arrive so, where the VMM registered for that
  bool once = false;   // end when the first VMM that was served has gone
};

// Blocks until SIGINT, SIGTERM or SIGHUP (ErrorCode::interrupted), or with
// `once` until the first VMM left: then ErrorCode::poisoned if a page could not
// be read back for it. VMMs that are still there wait for their missing pages
// if they keep the userfaultfd, as Firecracker does. ErrorCode::exists when
// somebody listens on the socket already; a stale socket file is replaced.
Status serve(const ServeOptions& options, CommandContext& context);

}  // namespace vmsnap
