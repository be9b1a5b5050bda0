#include "snap/progress.h"

#include <fmt/format.h>

#include <algorithm>

namespace vmsnap {

namespace {

using Clock = std::chrono::steady_clock;
constexpr double gib = 1 << 30;

std::string copying(const CaptureCounters& counters, double seconds) {
  const uint64_t zero = counters.zero_pages, duplicate = counters.duplicate_pages,
                 stored = counters.stored_pages, total = counters.armed_pages;
  // Compressed, not merely copied: what the rest of the wait depends on.
  const uint64_t done = zero + duplicate + stored;
  const double rate = seconds > 0 ? static_cast<double>(done) * page_size / seconds : 0;
  const double left = rate > 0 ? static_cast<double>(total - std::min(done, total)) * page_size / rate : 0;
  return fmt::format("copying {:.0f}%  {:.2f} GiB/s  ETA {:.0f} s  zero {} duplicate {} stored {}  faults {}",
                     total ? 100.0 * static_cast<double>(done) / static_cast<double>(total) : 0.0,
                     rate / gib, left, zero, duplicate, stored, counters.write_faults.load());
}

}  // namespace

void ProgressLine::show(SnapshotPhase phase, const CaptureCounters* counters) {
  switch (phase) {
    case SnapshotPhase::waiting_for_restore: return line_.draw("waiting for the VM's lazy restore to end");
    case SnapshotPhase::preparing: return line_.draw("preparing");
    case SnapshotPhase::committing: return line_.draw("committing");
    case SnapshotPhase::copying: break;
  }
  const auto now = Clock::now();
  if (copy_start_ == Clock::time_point()) copy_start_ = now;
  if (!counters || !line_.due()) return;
  line_.draw(copying(*counters, std::chrono::duration<double>(now - copy_start_).count()));
}

}  // namespace vmsnap
