#include "snap/sweeper.h"

#include <algorithm>
#include <vector>

namespace vmsnap {

namespace {

constexpr uint64_t window_bytes = Chunk::capacity * page_size;
constexpr std::chrono::milliseconds chunk_wait{200};

struct Run {
  uint64_t first = 0, count = 0;  // units
};

Chunk* wait_for_chunk(CaptureState& state) {
  while (!state.failed()) {
    if (Chunk* chunk = state.staging->take_empty(Staging::For::sweep, chunk_wait)) return chunk;
  }
  return nullptr;
}

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
// work in it, because that leaves a huge page whole.
Status release_window(CaptureState& state, CapturedPiece& piece, uint64_t first, uint64_t end,
                      const std::vector<Run>& runs) {
  uint64_t ours = 0, others = 0;
  for (const Run& run : runs) ours += run.count;
  for (uint64_t unit = first; unit < end; ++unit) {
    const UnitState now = piece.states.get(unit);
    others += now == UnitState::claimed || now == UnitState::armed;
  }
  if (others == ours) {
    VMSNAP_CHECK(state.release(piece, first, end - first));
  } else {
    for (const Run& run : runs) VMSNAP_CHECK(state.release(piece, run.first, run.count));
  }
  for (const Run& run : runs) {
    for (uint64_t unit = run.first; unit < run.first + run.count; ++unit) {
      piece.states.set(unit, UnitState::done);
    }
  }
  return {};
}

// A window of 4 KiB units, at most one chunk.
Status sweep_window(CaptureState& state, CapturedPiece& piece, uint64_t first, uint64_t end) {
  bool any = false;
  for (uint64_t unit = first; unit < end && !any; ++unit) {
    any = piece.states.get(unit) == UnitState::armed;
  }
  if (!any) return {};
  // The chunk first: nothing stays claimed, and no guest waits, while we wait.
  Chunk* chunk = wait_for_chunk(state);
  if (!chunk) return state.status();
  const std::vector<Run> runs = claim_runs(piece.states, first, end);
  for (const Run& run : runs) {
    const std::span<std::byte> to = chunk->add(piece.page_of(run.first), run.count);
    VMSNAP_CHECK(state.copy(piece, run.first, 0, to));
    VMSNAP_CHECK(state.check(piece, run.first, run.count, to));
  }
  VMSNAP_CHECK(release_window(state, piece, first, end, runs));
  state.counters.copied_pages += chunk->size();
  if (chunk->size() > 0) {
    state.staging->hand_on(chunk);
  } else {
    state.staging->give_back(chunk);
  }
  return {};
}

// One hugetlb page, a chunk at a time.
Status sweep_large_unit(CaptureState& state, CapturedPiece& piece, uint64_t unit) {
  if (!piece.states.claim(unit)) return {};
  for (uint64_t offset = 0; offset < piece.piece.unit_bytes; offset += window_bytes) {
    Chunk* chunk = wait_for_chunk(state);
    if (!chunk) return state.status();
    const uint64_t pages = std::min(window_bytes, piece.piece.unit_bytes - offset) / page_size;
    const std::span<std::byte> to = chunk->add(piece.page_of(unit) + offset / page_size, pages);
    VMSNAP_CHECK(state.copy(piece, unit, offset, to));
    state.staging->hand_on(chunk);
  }
  VMSNAP_CHECK(state.check(piece, unit, 1, {}));
  VMSNAP_CHECK(state.release(piece, unit, 1));
  piece.states.set(unit, UnitState::done);
  state.counters.copied_pages += piece.unit_pages();
  return {};
}

Status sweep_piece(CaptureState& state, CapturedPiece& piece) {
  const uint64_t count = piece.states.count();
  for (uint64_t first = 0; first < count && !state.failed();) {
    if (piece.piece.unit_bytes > page_size) {
      VMSNAP_CHECK(sweep_large_unit(state, piece, first));
      ++first;
      continue;
    }
    // Windows end at multiples of 2 MiB of the process's addresses.
    const uint64_t address = piece.units(first, 1).start.address();
    const uint64_t end = std::min(count, first + (window_bytes - address % window_bytes) / page_size);
    VMSNAP_CHECK(sweep_window(state, piece, first, end));
    first = end;
  }
  return {};
}

}  // namespace

void sweep(CaptureState& state) {
  for (const auto& piece : state.pieces) {
    if (const Status swept = sweep_piece(state, *piece); !swept) return state.fail(swept.error());
  }
}

}  // namespace vmsnap
