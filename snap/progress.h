// Progress of a snapshot on a terminal, one line drawn over and over.
#pragma once

#include <chrono>
#include <iosfwd>

#include "formats/terminal_line.h"
#include "snap/snapshot.h"

namespace vmsnap {

// One thread. Writes nothing at all unless `terminal`.
class ProgressLine {
 public:
  ProgressLine(std::ostream& out, bool terminal) : line_(out, terminal) {}

  void show(SnapshotPhase phase, const CaptureCounters* counters);
  void clear() { line_.clear(); }

 private:
  TerminalLine line_;
  std::chrono::steady_clock::time_point copy_start_;
};

}  // namespace vmsnap
