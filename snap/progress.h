// Progress of a snapshot on a terminal, one line drawn over and over.
#pragma once

#include <chrono>
#include <iosfwd>

#include "snap/snapshot.h"

namespace vmsnap {

// One thread. Writes nothing at all unless `terminal`.
class ProgressLine {
 public:
  ProgressLine(std::ostream& out, bool terminal) : out_(out), terminal_(terminal) {}
  ~ProgressLine() { clear(); }

  void show(SnapshotPhase phase, const CaptureCounters* counters);
  void clear();

 private:
  std::ostream& out_;
  bool terminal_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point copy_start_, last_;
};

}  // namespace vmsnap
