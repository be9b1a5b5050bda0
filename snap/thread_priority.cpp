#include "snap/thread_priority.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace vmsnap {

namespace {

constexpr int most_preferred = -20;
constexpr int lower_by = 5;

int nice_value() { return ::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid())); }

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
  wanted.nice = nice_value();
  wanted.runtime = slice_ns;
  ::syscall(SYS_sched_setattr, 0, &wanted, 0);
}

void set_policy(int policy) {
  const sched_param none = {};
  (void)::sched_setscheduler(0, policy, &none);
}

}  // namespace

void prefer_this_thread() {
  set_nice(most_preferred);
  schedule_as_batch(0);
}

void move_to(pid_t thread, int processor) {
  cpu_set_t allowed, one;
  CPU_ZERO(&one);
  if (processor < 0 || processor >= CPU_SETSIZE) return;
  if (::sched_getaffinity(thread, sizeof allowed, &allowed) < 0 || !CPU_ISSET(processor, &allowed)) return;
  CPU_SET(processor, &one);
  if (::sched_setaffinity(thread, sizeof one, &one) < 0) return;
  (void)::sched_setaffinity(thread, sizeof allowed, &allowed);
}

void take_short_turns() {
  constexpr uint64_t least_ns = 100000;  // there is
  if (::sched_getscheduler(0) != SCHED_IDLE) schedule_as_batch(least_ns);
}

LowerPriority::LowerPriority() : before_(nice_value()) {
  set_nice(before_ + lower_by);
}

LowerPriority::~LowerPriority() { set_nice(before_); }

HigherPriority::HigherPriority() : before_(nice_value()), was_idle_(::sched_getscheduler(0) == SCHED_IDLE) {
  if (was_idle_) set_policy(SCHED_BATCH);
  set_nice(most_preferred);
}

HigherPriority::~HigherPriority() {
  set_nice(before_);
  if (was_idle_) set_policy(SCHED_IDLE);
}

}  // namespace vmsnap
