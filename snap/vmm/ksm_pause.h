// Keeps KSM from merging pages while marks matter.
//
// A page that KSM merges loses its userfaultfd mark (measured on Linux 6.18),
// and a later write to it raises no event. The capture notices and fails, but
// would never get through on a host where ksmd is busy. So ksmd is paused
// (/sys/kernel/mm/ksm/run: 0 keeps what is merged), host-wide, for as long as
// a snapshot of mergeable memory runs, and only if it was running.
//
// Several snapshots at once share the pause: each holds a shared kernel lock
// (OFD) on a file in /run that says how it was before; the last to leave puts
// it back. Locks vanish with their holders, so the pause outlasts kill -9 only
// until the next snapshot, or the guard process, leaves.
#pragma once

#include "formats/error.h"
#include "formats/file.h"

namespace vmsnap {

class KsmPause {
 public:
  static Result<KsmPause> begin();

  KsmPause(KsmPause&&) = default;
  KsmPause& operator=(KsmPause&&) = default;
  ~KsmPause() { end(); }

  void end();

 private:
  KsmPause() = default;
  Fd lock_;
};

}  // namespace vmsnap
