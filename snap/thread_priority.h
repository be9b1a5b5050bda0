// Who gets a processor first: the guest and those it waits for, then the rest.
//
// By nice values, which Linux keeps for each thread (setpriority(2), NOTES), and
// SCHED_BATCH (sched(7)). Raising a nice value takes CAP_SYS_NICE, so none is
// changed unless we are root.
#pragma once

#include <sys/types.h>

namespace vmsnap {

// The calling thread answers those who wait: it is the first to get a processor
// that is free.
void prefer_this_thread();

// Moves a thread of ours to a processor, if it may run there; not for good. From
// another thread, because that takes as long as to answer two writes.
void move_to(pid_t thread, int processor);

// The calling thread has much to do: it asks for short turns on a processor, so
// that whoever wakes up there waits for a tenth of a millisecond, not for three
// (sched_setattr(2), sched_runtime, Linux 6.12). Not if all of us is SCHED_IDLE
// by the caller's wish.
void take_short_turns();

// While this lives, the calling thread has time.
class LowerPriority {
 public:
  LowerPriority();
  ~LowerPriority();
  LowerPriority(const LowerPriority&) = delete;
  LowerPriority& operator=(const LowerPriority&) = delete;

 private:
  const int before_;
};

// While this lives, somebody waits for what the calling thread holds, a
// page: none may take the processor from it, not even the guest. For as long as a
// few pages or a huge one take to copy.
class HigherPriority {
 public:
  HigherPriority();
  ~HigherPriority();
  HigherPriority(const HigherPriority&) = delete;
  HigherPriority& operator=(const HigherPriority&) = delete;

 private:
  const int before_;
  const bool was_idle_;  // SCHED_IDLE, which has a processor when nobody wants one
};

}  // namespace vmsnap
