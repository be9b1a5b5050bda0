#include "snap/vmm/caretaker.h"

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

namespace vmsnap {

void become_caretaker(const char* name) {
  ::setsid();
  ::prctl(PR_SET_NAME, name);
  for (int number = 1; number < NSIG; ++number) {
    if (number != SIGCHLD) ::signal(number, SIG_IGN);
  }
}

}  // namespace vmsnap
