#include "snap/thread_priority.h"

#include <sys/resource.h>
#include <unistd.h>

namespace vmsnap {

namespace {

void set_nice(int value) {
  // Of one thread, on Linux: setpriority(2), NOTES.
  ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), value);
}

}  // namespace

void prefer_this_thread() { set_nice(-20); }
void defer_this_thread() { set_nice(5); }

}  // namespace vmsnap
