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

}  // namespace

void prefer_this_thread() { set_nice(-20); }

void take_short_turns() {
  // struct sched_attr of linux/sched/types.h, version 0; glibc 2.36 has none.
  struct {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } wanted = {};
  wanted.size = sizeof wanted;
  wanted.policy = SCHED_OTHER;
  wanted.nice = ::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()));
  wanted.runtime = 100000;  // ns, the least there is
  ::syscall(SYS_sched_setattr, 0, &wanted, 0);
}

LowerPriority::LowerPriority() : before_(::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()))) {
  set_nice(before_ + lower_by);
}

LowerPriority::~LowerPriority() { set_nice(before_); }

}  // namespace vmsnap
