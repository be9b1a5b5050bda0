// The background half of PageServer: copying what nobody has asked for yet, and
// letting go of the ranges when all is there.

#include <algorithm>

#include "formats/log.h"
#include "restore/page_server.h"

namespace vmsnap {

using State = DecodedExtent::State;

// Copies about `budget` pages of what is decoded, or all there is.
Status PageServer::fill(uint64_t budget) {
  while (budget > 0 && !stalled_) {
    if (!extent_) {
      extent_ = source_->take();
      extent_done_ = 0;
      if (!extent_) return {};
    }
    const uint64_t done = VMSNAP_TRY(fill_piece(budget));
    extent_done_ += done;
    budget -= std::min(budget, done);
    if (extent_done_ >= extent_->pages) {
      source_->give_back(extent_);
      extent_ = nullptr;
    }
  }
  return {};
}

// One step into the current extent; returns how many of its pages are settled,
// 0 (and stalled_) when the kernel wants the events read first.
Result<uint64_t> PageServer::fill_piece(uint64_t budget) {
  const ServedRange& range = ranges_[extent_->range];
  const uint64_t first_page = extent_->first_page + extent_done_;
  const Piece piece = next_piece(range.unit / page_size, budget);
  switch (piece.state) {
    case State::zero:
      return piece.pages;  // absent is zero, or somebody has it
    case State::unreadable:
      stalled_ = VMSNAP_TRY(give_up(range, first_page, "it is damaged")) == Answer::again;
      return stalled_ ? 0 : piece.pages;
    case State::data:
      break;
  }

  const RemotePtr to = range.address_of(first_page);
  const auto copied = VMSNAP_TRY(uffd_.copy(to, extent_->bytes_of(extent_done_, piece.pages)));
  const uint64_t pages = copied.bytes / page_size;
  if (pages > 0) {
    marks_.set_resolved(first_page, pages);
    count_filled(filled_by_background_, pages);
    return pages;
  }
  const uint64_t unit_pages = range.unit / page_size;
  switch (copied.outcome) {
    case CopyOutcome::already_there:
      // A predecessor was killed between its copy and its mark.
      marks_.set_resolved(first_page, unit_pages);
      found_filled_.fetch_add(unit_pages, std::memory_order_relaxed);
      return unit_pages;
    case CopyOutcome::no_mapping:
      // Unmapped, or the piece reaches over the end of a mapping that was split:
      // then the single page goes in.
      if (piece.pages > unit_pages) return fill_piece(unit_pages);
      return unit_pages;
    default:
      stalled_ = true;
      return 0;
  }
}

// What comes next in the current extent: a run of pages of one kind, at most
// `budget` of them; a huge page is whole or nothing.
PageServer::Piece PageServer::next_piece(uint64_t unit_pages, uint64_t budget) const {
  const auto state_of = [&](uint64_t index) {
    if (!marks_.wanted(extent_->first_page + index)) return State::zero;
    return extent_->states[index];
  };
  if (unit_pages > 1) {
    Piece unit = {State::zero, unit_pages};
    for (uint64_t i = 0; i < unit_pages; ++i) unit.state = std::max(unit.state, state_of(i));
    return unit;
  }
  Piece run = {state_of(extent_done_), 1};
  if (run.state == State::unreadable) return run;
  const uint64_t end = std::min(extent_->pages, extent_done_ + std::max<uint64_t>(budget, 1));
  while (extent_done_ + run.pages < end && state_of(extent_done_ + run.pages) == run.state) {
    ++run.pages;
  }
  return run;
}

bool PageServer::nothing_left() const {
  return !extent_ && waiting_.empty() && source_->exhausted();
}

// All data is in. What is still absent is zero, and is so without us: the
// ranges need not be watched any more. Unregistering wakes who waits; a removal
// that is under way is released by reading its event, or by the last close of
// the userfaultfd. Pages that could not even be poisoned stay watched, because
// nothing else keeps them from reading as zero.
Status PageServer::release_ranges() {
  for (const ServedRange& range : ranges_) {
    std::vector<RemoteRange> kept;
    for (const RemoteRange& unit : left_missing_) {
      if (unit.start >= range.range.start && unit.start < range.range.end()) kept.push_back(unit);
    }
    std::sort(kept.begin(), kept.end(),
              [](const RemoteRange& a, const RemoteRange& b) { return a.start < b.start; });
    RemotePtr from = range.range.start;
    for (const RemoteRange& unit : kept) {
      if (from < unit.start) VMSNAP_CHECK(uffd_.unregister_range({from, unit.start - from}));
      from = unit.end();
    }
    if (from < range.range.end()) {
      VMSNAP_CHECK(uffd_.unregister_range({from, range.range.end() - from}));
    }
  }
  while (VMSNAP_TRY(read_events()) > 0) {
  }
  return {};
}

}  // namespace vmsnap
