#include "restore/progress.h"

#include <algorithm>
#include <ostream>

namespace vmsnap {

std::string progress_line(const PageServerCounters& counters, std::chrono::duration<double> since) {
  constexpr double gib = 1 << 30;
  const double total = static_cast<double>(counters.data_pages * page_size) / gib;
  const double done = std::min(total, static_cast<double>(counters.filled() * page_size) / gib);
  const double rate = since.count() > 0 ? done / since.count() : 0;
  const double percent = total > 0 ? 100 * done / total : 100;
  std::string line =
      fmt::format("restore: filling {:.0f} % of {:.1f} GiB, {:.2f} GiB/s", percent, total, rate);
  if (rate > 0) line += fmt::format(", {:.0f} s left", (total - done) / rate);
  return line + fmt::format(", {} faults", counters.faults);
}

void RestoreProgress::show(const PageServerCounters& counters) {
  if (!context_.terminal) return;
  const Clock::time_point now = Clock::now();
  if (visible_ && now - drawn_ < std::chrono::milliseconds(200)) return;
  // Back to the start of the line, then whatever is longer is erased.
  context_.err << "\r" << progress_line(counters, now - started_) << "\033[K" << std::flush;
  drawn_ = now;
  visible_ = true;
}

void RestoreProgress::clear() {
  if (visible_) context_.err << "\r\033[K" << std::flush;
  visible_ = false;
}

}  // namespace vmsnap
