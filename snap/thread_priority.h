// Who gets a processor first: the guest and those it waits for, then the rest.
//
// By nice values, which Linux keeps for each thread (setpriority(2), NOTES).
// Raising one takes CAP_SYS_NICE, so nothing is changed unless we are root.
#pragma once

namespace vmsnap {

// The calling thread answers those who wait: it gets a processor as soon as it
// wants one.
void prefer_this_thread();

// The calling thread has much to do: it asks for short turns on a processor, so
// that whoever wakes up there waits for a tenth of a millisecond, not for three
// (sched_setattr(2), sched_runtime of SCHED_OTHER, Linux 6.12).
void take_short_turns();

// While this lives, the calling thread has time.
class LowerPriority {
 public:
  LowerPriority();
  ~LowerPriority();
  LowerPriority(const LowerPriority&) = delete;
  LowerPriority& operator=(const LowerPriority&) = delete;

 private:
  int before_ = 0;
};

}  // namespace vmsnap
