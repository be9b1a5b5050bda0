#include "snap/window_copy.h"

#include <vector>

namespace vmsnap {

namespace {

struct Run {
  uint64_t first = 0, count = 0;  // units
};

// Units of [first, end) that are still to be copied, claimed, as runs.
std::vector<Run> claim_runs(UnitStates& states, uint64_t first, uint64_t end) {
  std::vector<Run> runs;
  for (uint64_t unit = first; unit < end; ++unit) {
    if (states.get(unit) != UnitState::armed || !states.claim(unit)) continue;
    if (!runs.empty() && runs.back().first + runs.back().count == unit) {
      ++runs.back().count;
    } else {
      runs.push_back({unit, 1});
    }
  }
  return runs;
}

// Frees the copied runs of one window. In one call where nobody else is at
// work in it, because that leaves a huge page whole; says whether it was.
Result<bool> release_runs(CaptureState& state, CapturedPiece& piece, uint64_t first, uint64_t end,
                          const std::vector<Run>& runs) {
  uint64_t ours = 0, others = 0;
  for (const Run& run : runs) ours += run.count;
  for (uint64_t unit = first; unit < end; ++unit) {
    const UnitState now = piece.states.get(unit);
    others += now == UnitState::claimed || now == UnitState::armed;
  }
  const bool at_once = others == ours;
  if (at_once) {
    VMSNAP_CHECK(state.release(piece, first, end - first));
  } else {
    for (const Run& run : runs) VMSNAP_CHECK(state.release(piece, run.first, run.count));
  }
  for (const Run& run : runs) {
    for (uint64_t unit = run.first; unit < run.first + run.count; ++unit) {
      piece.states.set(unit, UnitState::done);
    }
  }
  return at_once;
}

}  // namespace

Status copy_window(CaptureState& state, CapturedPiece& piece, uint64_t first, uint64_t end,
                   Chunk& chunk) {
  const std::vector<Run> runs = claim_runs(piece.states, first, end);
  if (runs.empty()) return {};
  uint64_t pages = 0;
  for (const Run& run : runs) {
    const std::span<std::byte> to = chunk.add(piece.page_of(run.first), run.count);
    VMSNAP_CHECK(state.copy(piece, run.first, 0, to));
    VMSNAP_CHECK(state.check(piece, run.first, run.count, to));
    pages += run.count;
  }
  const bool at_once = VMSNAP_TRY(release_runs(state, piece, first, end, runs));
  const CapturedPiece::Window window = piece.window(first);
  if (piece.is_huge(first) && (!at_once || first != window.first || end != window.end)) {
    state.note_split(piece.units(window.first, 1).start);
  }
  state.counters.copied_pages += pages;
  return {};
}

Status free_large_unit(CaptureState& state, CapturedPiece& piece, uint64_t unit) {
  VMSNAP_CHECK(state.check(piece, unit, 1, {}));
  VMSNAP_CHECK(state.release(piece, unit, 1));
  piece.states.set(unit, UnitState::done);
  state.counters.copied_pages += piece.unit_pages();
  return {};
}

}  // namespace vmsnap
