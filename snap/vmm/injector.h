// System calls run inside another process, by a helper process of ours that
// does not die with us.
//
// A tracer that is killed while the traced thread has borrowed registers wrecks
// that thread, and with it somebody's VM. So the tracing is done by a forked
// child in its own session that ignores signals, does one short errand, and
// puts everything back whatever becomes of its parent.
#pragma once

#include <functional>

#include "formats/error.h"
#include "snap/vmm/process.h"
#include "snap/vmm/remote_thread.h"

namespace vmsnap {

// The errand's side of the conversation with its parent, in the child.
class InjectorLink {
 public:
  explicit InjectorLink(int fd) : fd_(fd) {}
  // Sends one number to the parent and waits for its answer. `otherwise` is
  // the answer when the parent is dead, or stands still (SIGSTOP) for two seconds,
  // for which the VM's thread does: then it may get to the question yet.
  int64_t ask(int64_t number, int64_t otherwise) const;

 private:
  int fd_;
};

// What the errand fails with when it got no answer, and the VM is to have it undone.
Error stood_still(const Process& process);

// Runs `errand` with a seized thread in the child; each number it sends with
// ask() is given to `answer` here. Returns the errand's value (a system call's
// result, -errno included). Blocks for some milliseconds; ErrorCode::vm if the
// process dies meanwhile or the child was killed.
//
// `errand` runs in the child: it must not take locks that other threads of
// ours may hold, nor print.
Result<int64_t> run_injected(const Process& process,
                             const std::function<Result<int64_t>(RemoteThread&, InjectorLink&)>& errand,
                             const std::function<int64_t(int64_t)>& answer = {});

}  // namespace vmsnap
