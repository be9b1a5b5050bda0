#include "snap/turn.h"

#include <sched.h>

#include <utility>

namespace vmsnap {

namespace {

// To look for events is a system call of 0.2 us.
constexpr std::chrono::microseconds between_looks{20};

}  // namespace

void Turn::end_if_wanted() {
  if (is_wanted()) ::sched_yield();
}

bool Turn::is_wanted() {
  const uint64_t woken = state_.writers_woken;
  if (woken != std::exchange(woken_seen_, woken)) return true;
  const auto now = std::chrono::steady_clock::now();
  if (now - looked_ < between_looks) return false;
  looked_ = now;
  return state_.uffd.has_events();
}

}  // namespace vmsnap
