#include "snap/vmm/thread_stop.h"

#include <sys/ptrace.h>

#include <algorithm>
#include <set>

#include "snap/vmm/ptrace_call.h"

namespace vmsnap {

Result<ThreadStop> ThreadStop::stop(const Process& process) {
  ThreadStop stopped(process);
  std::set<pid_t> known;
  // Threads start threads until all stand still: look again until none is new.
  for (bool found_new = true; found_new;) {
    found_new = false;
    std::vector<pid_t> fresh;
    for (const pid_t tid : VMSNAP_TRY(process.threads())) {
      if (!known.insert(tid).second) continue;
      if (!VMSNAP_TRY(seize_thread(process, tid))) continue;
      stopped.tids_.push_back(tid);
      fresh.push_back(tid);
      VMSNAP_CHECK(interrupt_start(process, tid));
    }
    for (const pid_t tid : fresh) {
      found_new = true;
      if (!VMSNAP_TRY(interrupt_finish(process, tid))) std::erase(stopped.tids_, tid);
    }
  }
  if (stopped.tids_.empty()) return fail(ErrorCode::vm, "{} has ended", process.describe());
  return stopped;
}

void ThreadStop::resume() {
  for (const pid_t tid : tids_) {
    auto registers = get_registers(*process_, tid);
    if (registers && repeat_call_cut_short(*process_, tid, *registers)) {
      (void)set_registers(*process_, tid, *registers);
    }
    trace(PTRACE_DETACH, tid, 0, uint64_t{0});
  }
  tids_.clear();
}

}  // namespace vmsnap
