#include "snap/sweeper.h"

#include <algorithm>

#include "snap/window_copy.h"

namespace vmsnap {

namespace {

constexpr uint64_t chunk_bytes = Chunk::capacity * page_size;
constexpr uint64_t small_window = 64;  // pages
constexpr std::chrono::milliseconds chunk_wait{200};

Chunk* wait_for_chunk(CaptureState& state) {
  while (!state.failed()) {
    if (Chunk* chunk = state.staging->take_empty(Staging::For::sweep, chunk_wait)) return chunk;
  }
  return nullptr;
}

// Whoever writes to a page that the sweep is copying waits for all of the
// window: few pages, except of a huge page, which must be freed as a whole.
CapturedPiece::Window next_window(const CapturedPiece& piece, uint64_t first) {
  CapturedPiece::Window window = piece.window(first);
  if (piece.is_huge(first)) return {first, window.end};
  return {first, std::min(window.end, first + small_window)};
}

// Fills chunks with what is armed and hands them on.
class Sweep {
 public:
  explicit Sweep(CaptureState& state) : state_(state) {}
  ~Sweep() {
    if (chunk_) state_.staging->give_back(chunk_);
  }

  // Units of 4 KiB.
  Status pages(CapturedPiece& piece, uint64_t first, uint64_t end);
  Status large_unit(CapturedPiece& piece, uint64_t unit);
  void flush();

 private:
  bool make_room(uint64_t pages);

  CaptureState& state_;
  Chunk* chunk_ = nullptr;
};

void Sweep::flush() {
  if (!chunk_) return;
  if (chunk_->size() > 0) {
    state_.staging->hand_on(chunk_);
  } else {
    state_.staging->give_back(chunk_);
  }
  chunk_ = nullptr;
}

// Before anything is claimed: no guest waits while we wait. False when the
// capture has failed.
bool Sweep::make_room(uint64_t pages) {
  if (chunk_ && chunk_->free() >= pages) return true;
  flush();
  chunk_ = wait_for_chunk(state_);
  return chunk_ != nullptr;
}

Status Sweep::pages(CapturedPiece& piece, uint64_t first, uint64_t end) {
  while (first < end && !state_.failed()) {
    if (piece.states.get(first) != UnitState::armed) {
      ++first;
      continue;
    }
    const CapturedPiece::Window window = next_window(piece, first);
    if (!make_room(window.end - window.first)) break;
    VMSNAP_CHECK(copy_window(state_, piece, window.first, window.end, *chunk_));
    first = window.end;
  }
  return state_.status();
}

// One hugetlb page, a chunk at a time.
Status Sweep::large_unit(CapturedPiece& piece, uint64_t unit) {
  if (!piece.states.claim(unit)) return {};
  for (uint64_t offset = 0; offset < piece.piece.unit_bytes; offset += chunk_bytes) {
    const uint64_t pages = std::min(chunk_bytes, piece.piece.unit_bytes - offset) / page_size;
    if (!make_room(pages)) return state_.status();
    const std::span<std::byte> to = chunk_->add(piece.page_of(unit) + offset / page_size, pages);
    VMSNAP_CHECK(state_.copy(piece, unit, offset, to));
  }
  VMSNAP_CHECK(state_.check(piece, unit, 1, {}));
  VMSNAP_CHECK(state_.release(piece, unit, 1));
  piece.states.set(unit, UnitState::done);
  state_.counters.copied_pages += piece.unit_pages();
  return {};
}

Status sweep_all(CaptureState& state) {
  Sweep sweep(state);
  for (const UnitRun& run : state.written_early) {
    if (run.piece->piece.unit_bytes == page_size) {
      VMSNAP_CHECK(sweep.pages(*run.piece, run.first, run.end()));
    }
  }
  for (const auto& piece : state.pieces) {
    if (piece->piece.unit_bytes == page_size) {
      VMSNAP_CHECK(sweep.pages(*piece, 0, piece->states.count()));
      continue;
    }
    for (uint64_t unit = 0; unit < piece->states.count() && !state.failed(); ++unit) {
      VMSNAP_CHECK(sweep.large_unit(*piece, unit));
    }
  }
  sweep.flush();
  return state.status();
}

}  // namespace

void sweep(CaptureState& state) {
  if (const Status swept = sweep_all(state); !swept) state.fail(swept.error());
}

}  // namespace vmsnap
