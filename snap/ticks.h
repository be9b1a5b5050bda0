// Interrupts what a thread waits in, from time to time, so that it can look around: a
// read(2) of a userfaultfd has no limit of its own.
//
// By SIGURG, which is ignored where nobody handles it, so that a late one does no harm.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <ctime>

#include "formats/error.h"

namespace vmsnap {

// While this lives, system calls in which the thread that started it waits end with
// EINTR at intervals (timer_create(2), SIGEV_THREAD_ID). One that comes between two
// calls interrupts nothing: the next one is due an interval later.
class Ticks {
 public:
  static Result<Ticks> start(std::chrono::milliseconds interval);
  Ticks(Ticks&& other) noexcept;
  Ticks& operator=(Ticks&&) = delete;
  ~Ticks();

  // Whether one came since this was asked last: of the thread that started it.
  bool take();

  // One at once for a thread that has Ticks, from any other. Does not block.
  static void interrupt(pid_t thread);

 private:
  explicit Ticks(timer_t timer) : timer_(timer), ours_(true) {}

  timer_t timer_;
  bool ours_;
};

}  // namespace vmsnap
