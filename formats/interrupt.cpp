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
  for (const int number : {SIGINT, SIGTERM}) ::sigaction(number, &action, nullptr);
  // Nobody insists by this one: a terminal that is closed sends it by the shell, and
  // by the kernel a moment later.
  action.sa_flags = 0;
  // Ignored by who started us: nohup(1) means it.
  struct sigaction before = {};
  const bool known = ::sigaction(SIGHUP, nullptr, &before) == 0;
  if (!known || before.sa_handler != SIG_IGN) ::sigaction(SIGHUP, &action, nullptr);
}

bool interrupted() { return signal_seen.load(std::memory_order_relaxed) != 0; }

Status check_interrupted() {
  if (!interrupted()) return {};
  return fail(ErrorCode::interrupted, "stopped by signal {}", signal_seen.load());
}

}  // namespace vmsnap
