#include "snap/progress.h"

#include <fmt/format.h>

#include <ostream>

namespace vmsnap {

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds redraw_interval{200};
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
  if (!terminal_) return;
  const auto now = Clock::now();
  if (drawn_ && phase == SnapshotPhase::copying && now - last_ < redraw_interval) return;
  last_ = now;
  std::string line;
  switch (phase) {
    case SnapshotPhase::preparing: line = "preparing"; break;
    case SnapshotPhase::copying:
      if (copy_start_ == Clock::time_point()) copy_start_ = now;
      if (counters) line = copying(*counters, std::chrono::duration<double>(now - copy_start_).count());
      break;
    case SnapshotPhase::committing: line = "committing"; break;
  }
  out_ << "\r\033[K" << line << std::flush;
  drawn_ = true;
}

void ProgressLine::clear() {
  if (drawn_) out_ << "\r\033[K" << std::flush;
  drawn_ = false;
}

}  // namespace vmsnap
