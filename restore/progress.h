// The line that a restore shows on a terminal while pages come in.
#pragma once

#include <chrono>

#include "formats/command.h"
#include "formats/terminal_line.h"
#include "restore/page_server.h"

namespace vmsnap {

class RestoreProgress {
 public:
  // Draws nothing unless the context says that it is a terminal.
  explicit RestoreProgress(CommandContext& context) : line_(context.err, context.terminal) {}

  // Draws at most five times a second.
  void show(const PageServerCounters& counters, Prefetch prefetch = Prefetch::all);
  // Removes the line.
  void clear() { line_.clear(); }

 private:
  using Clock = std::chrono::steady_clock;

  TerminalLine line_;
  Clock::time_point started_ = Clock::now();
};

// "restore: filling 40 % of 1.5 GiB, 0.81 GiB/s, 2 s left, 1234 faults", or when
// not all is loaded "restore: serving, 40 % of 1.5 GiB there, 1234 faults"
std::string progress_line(const PageServerCounters& counters, std::chrono::duration<double> since,
                          Prefetch prefetch = Prefetch::all);

}  // namespace vmsnap
