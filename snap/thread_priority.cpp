#include "snap/thread_priority.h"

#include <sys/resource.h>
#include <unistd.h>

namespace vmsnap {

namespace {

constexpr int lower_by = 5;

void set_nice(int value) {
  if (::geteuid() == 0) ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), value);
}

}  // namespace

void prefer_this_thread() { set_nice(-20); }

LowerPriority::LowerPriority() : before_(::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()))) {
  set_nice(before_ + lower_by);
}

LowerPriority::~LowerPriority() { set_nice(before_); }

}  // namespace vmsnap
