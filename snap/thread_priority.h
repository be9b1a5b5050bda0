// Who gets a processor first: the guest and those it waits for, then the rest.
//
// By nice values, which Linux keeps for each thread (setpriority(2), NOTES), and
// SCHED_BATCH (sched(7)). Raising a nice value takes CAP_SYS_NICE, so none is
// changed unless we are root.
#pragma once

namespace vmsnap {

// The calling thread answers those who wait: it is the first to get a processor
// that is free.
void prefer_this_thread();

// The calling thread has much to do: it asks for short turns on a processor, so
// that whoever wakes up there waits for a tenth of a millisecond, not for three
// (sched_setattr(2), sched_runtime, Linux 6.12). Not if all of us is SCHED_IDLE
// by the caller's wish.
void take_short_turns();

enum class Priority {
  first,  // somebody may be waiting for it
  last,   // it has time
};

// While this lives, the calling thread has that priority.
class ScopedPriority {
 public:
  explicit ScopedPriority(Priority priority);
  ~ScopedPriority();
  ScopedPriority(const ScopedPriority&) = delete;
  ScopedPriority& operator=(const ScopedPriority&) = delete;

 private:
  const int before_;  // nice value
};

}  // namespace vmsnap
