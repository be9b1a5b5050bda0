// The line that a restore shows on a terminal while pages come in.
#pragma once

#include <chrono>

#include "formats/command.h"
#include "restore/page_server.h"

namespace vmsnap {

class RestoreProgress {
 public:
  // Draws nothing unless the context says that it is a terminal.
  explicit RestoreProgress(CommandContext& context) : context_(context) {}

  // Draws at most five times a second.
  void show(const PageServerCounters& counters);
  // Removes the line.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;

  CommandContext& context_;
  Clock::time_point started_ = Clock::now();
  Clock::time_point drawn_;
  bool visible_ = false;
};

// "restore: filling 40 % of 1.5 GiB, 0.81 GiB/s, 2 s left, 1234 faults"
std::string progress_line(const PageServerCounters& counters, std::chrono::duration<double> since);

}  // namespace vmsnap
