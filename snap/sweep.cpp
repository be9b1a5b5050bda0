#include "snap/sweep.h"

#include <algorithm>
#include <optional>

#include "snap/thread_priority.h"
#include "snap/window_copy.h"

namespace vmsnap {

namespace {

constexpr uint64_t chunk_bytes = Chunk::capacity * page_size;
// Whoever writes to a page that the sweep is copying waits for all that it copies in
// one go, 50 us, except of a huge page, which is freed as a whole. Not less: whenever
// pages are freed the processors on which the guest runs are interrupted.
constexpr uint64_t pages_at_once = 128;

bool is_large(const CapturedPiece& piece) { return piece.piece.unit_bytes > page_size; }

}  // namespace

bool Sweep::wait_finished(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  return finished_.wait_for(lock, limit, [&] { return finished(); });
}

bool Sweep::take_early(Work& work) {
  for (; early_ < state_.written_early.size(); ++early_, unit_ = 0) {
    const UnitRun& run = state_.written_early[early_];
    if (is_large(*run.piece) || unit_ >= run.count) continue;
    const uint64_t first = run.first + unit_;
    work = {run.piece, first, std::min(run.end(), run.piece->window(first).end)};
    unit_ += work.end - work.first;
    return true;
  }
  return false;
}

// A window of 2 MiB of small pages, or one large one.
bool Sweep::take(Work& work) {
  if (take_early(work)) return true;
  for (; piece_ < state_.pieces.size(); ++piece_, unit_ = 0) {
    CapturedPiece& piece = *state_.pieces[piece_];
    while (unit_ < piece.states.count() && piece.states.get(unit_) != UnitState::armed) ++unit_;
    if (unit_ == piece.states.count()) continue;
    work = {&piece, unit_, is_large(piece) ? unit_ + 1 : piece.window(unit_).end};
    unit_ = work.end;
    return true;
  }
  exhausted_ = true;
  return false;
}

Result<bool> Sweep::next(Chunk& chunk, const std::function<Status()>& full, Turn& turn) {
  Work work;
  {
    std::lock_guard lock(mutex_);
    if (exhausted_ || state_.failed() || !take(work)) {
      if (finished()) finished_.notify_all();
      return false;
    }
    ++copying_;
  }
  const Status copied = is_large(*work.piece) ? copy_large_unit(work, chunk, full) : copy_pages(work, chunk, turn);
  // Before anybody can see that the sweep is through, without what failed.
  if (!copied) state_.fail(copied.error());
  {
    std::lock_guard lock(mutex_);
    --copying_;
    if (finished()) finished_.notify_all();
  }
  VMSNAP_CHECK(copied);
  return true;
}

Status Sweep::copy_pages(const Work& work, Chunk& chunk, Turn& turn) {
  const uint64_t writes = state_.counters.write_faults;
  const bool quiet = writes_seen_.exchange(writes) == writes;
  const uint64_t step = work.piece->is_whole(work.first) ? Chunk::capacity : pages_at_once;
  for (uint64_t first = work.first; first < work.end && !state_.failed(); first += step) {
    turn.end_if_wanted();
    std::optional<HigherPriority> preferred;  // a writer may wait for what is claimed
    if (!quiet) preferred.emplace();
    VMSNAP_CHECK(copy_window(state_, *work.piece, first, std::min(work.end, first + step), chunk));
  }
  return {};
}

Status Sweep::copy_large_unit(const Work& work, Chunk& chunk, const std::function<Status()>& full) {
  CapturedPiece& piece = *work.piece;
  if (!piece.states.claim(work.first)) return {};
  for (uint64_t offset = 0; offset < piece.piece.unit_bytes; offset += chunk_bytes) {
    if (offset > 0) VMSNAP_CHECK(full());
    const uint64_t pages = std::min(chunk_bytes, piece.piece.unit_bytes - offset) / page_size;
    const std::span<std::byte> to = chunk.add(piece.page_of(work.first) + offset / page_size, pages);
    VMSNAP_CHECK(state_.copy(piece, work.first, offset, to));
  }
  return free_large_unit(state_, piece, work.first);
}

}  // namespace vmsnap
