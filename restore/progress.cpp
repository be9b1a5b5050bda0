#include "restore/progress.h"

#include <algorithm>

namespace vmsnap {

std::string progress_line(const PageServerCounters& counters, std::chrono::duration<double> since,
                          Prefetch prefetch) {
  constexpr double gib = 1 << 30;
  const double total = static_cast<double>(counters.data_pages * page_size) / gib;
  const double done = std::min(total, static_cast<double>(counters.filled() * page_size) / gib);
  const double rate = since.count() > 0 ? done / since.count() : 0;
  const double percent = total > 0 ? 100 * done / total : 100;
  if (prefetch != Prefetch::all) {
    return fmt::format("restore: serving, {:.0f} % of {:.1f} GiB there, {} faults", percent, total,
                       counters.faults);
  }
  std::string line =
      fmt::format("restore: filling {:.0f} % of {:.1f} GiB, {:.2f} GiB/s", percent, total, rate);
  if (rate > 0) line += fmt::format(", {:.0f} s left", (total - done) / rate);
  return line + fmt::format(", {} faults", counters.faults);
}

void RestoreProgress::show(const PageServerCounters& counters, Prefetch prefetch) {
  if (line_.due()) line_.draw(progress_line(counters, Clock::now() - started_, prefetch));
}

}  // namespace vmsnap
