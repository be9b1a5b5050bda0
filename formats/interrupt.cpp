#include "formats/interrupt.h"

#include <signal.h>

#include <atomic>

namespace vmsnap {

namespace {

std::atomic<int> signal_seen = 0;
static_assert(std::atomic<int>::is_always_lock_free);

void note_signal(int number) { signal_seen.store(number); }

}  // namespace

void install_interrupt_handlers() {
  struct sigaction action = {};
  action.sa_handler = note_signal;
  // The second time the default action: whoever insists gets his way.
  action.sa_flags = SA_RESETHAND;
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) ::sigaction(number, &action, nullptr);
}

bool interrupted() { return signal_seen.load(std::memory_order_relaxed) != 0; }

Status check_interrupted() {
  if (!interrupted()) return {};
  return fail(ErrorCode::interrupted, "stopped by signal {}", signal_seen.load());
}

}  // namespace vmsnap
