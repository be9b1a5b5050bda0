// A small process that sees to the VM when we cannot.
//
// It is forked before anything is touched, lives in a session of its own,
// ignores signals, and shares nothing with us but a socket (and its own
// duplicates of the monitor's socket, the KSM lock and the userfaultfd). When the
// socket closes while a pause is on, it sends `cont`, whoever killed us, and tries
// for as long as a QEMU that hangs needs to listen, up to an hour. When we stand
// still (SIGSTOP, a debugger) for longer than the limit while guest memory is
// write-protected, it kills us and frees the memory: a snapshot is worth less than
// the guest. Our end alone would not free it: a thread that waits for a disk that
// hangs cannot be killed, and keeps all that we have open.
//
// What it cannot help against: being killed itself by a SIGKILL of its own.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "snap/vmm/ksm_pause.h"
#include "snap/vmm/process.h"
#include "snap/vmm/qmp.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

// What is guarded. Borrowed until start() returns.
struct GuardedVm {
  const Process& process;
  const Qmp* qmp = nullptr;              // null: there is no pause to undo
  std::vector<RemoteRange> memory = {};  // what will be registered with our userfaultfd
};

class Guard {
 public:
  // `ksm`: a pause to end when we are gone; may be null. Fork happens here, so no
  // other thread of ours may run yet.
  static Result<Guard> start(const GuardedVm& vm, std::optional<KsmPause>* ksm,
                             std::chrono::milliseconds stand_still_limit);

  Guard(Guard&& other) noexcept
      : socket_(std::move(other.socket_)),
        pid_(std::exchange(other.pid_, 0)),
        beat_every_(other.beat_every_),
        last_beat_(other.last_beat_.load()) {}
  Guard& operator=(Guard&&) = delete;
  // Waits for the guard to end, which it does at once unless it has to resume the
  // VM: then up to 12 s, and leaves it to that. The monitor's socket must be closed
  // by then, or QEMU would not listen to the guard's own.
  ~Guard();

  // All from any thread; they never block.
  void pausing() { tell('P'); }    // before `stop` is sent
  void resumed() { tell('R'); }    // after `cont` was answered; the guard lets the monitor go
  void watching() { tell('W'); }   // memory is protected: heartbeats count from here
  // All of the memory is registered with this: the guard gets a duplicate, so what was
  // registered must be unregistered, to close it is not enough.
  void watched(const Uffd& uffd) const;
  // As often as you like: each that is passed on wakes the guard, which would
  // take a processor from whoever waits for a page, so few of them are.
  void heartbeat();
  void unwatched() { tell('U'); }  // memory is free again
  // All is copied, and the disk may take its time, though the VM stands still: no
  // heartbeat is due any more.
  void committing() { tell('C'); }

 private:
  using Clock = std::chrono::steady_clock;

  Guard(Fd socket, pid_t pid, Clock::duration beat_every)
      : socket_(std::move(socket)), pid_(pid), beat_every_(beat_every) {}
  void tell(char what) const;

  Fd socket_;
  pid_t pid_ = 0;
  Clock::duration beat_every_;
  std::atomic<Clock::time_point> last_beat_{};
};

}  // namespace vmsnap
