#include "snap/thread_priority.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace vmsnap {

namespace {

constexpr int lower_by = 5;

void set_nice(int value) {
  if (::geteuid() == 0) ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), value);
}

// struct sched_attr of linux/sched/types.h, version 0; glibc 2.36 has none.
struct SchedulingAttributes {
  uint32_t size;
  uint32_t policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime, deadline, period;
};

// SCHED_BATCH does not interrupt what runs elsewhere when it wakes. A guest that
// waits for a page has left its processor, so that there is one for whoever
// brings it; interrupting another instead costs a message between processors,
// which in a VM takes longer than the page.
void schedule_as_batch(uint64_t slice_ns) {
  SchedulingAttributes wanted = {};
  wanted.size = sizeof wanted;
  wanted.policy = SCHED_BATCH;
  wanted.nice = ::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()));
  wanted.runtime = slice_ns;
  ::syscall(SYS_sched_setattr, 0, &wanted, 0);
}

}  // namespace

void prefer_this_thread() {
  set_nice(-20);
  schedule_as_batch(0);
}

void take_short_turns() {
  constexpr uint64_t least_ns = 100000;  // there is
  if (::sched_getscheduler(0) != SCHED_IDLE) schedule_as_batch(least_ns);
}

LowerPriority::LowerPriority() : before_(::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()))) {
  set_nice(before_ + lower_by);
}

LowerPriority::~LowerPriority() { set_nice(before_); }

}  // namespace vmsnap
