// The background half of PageServer: copying what nobody has asked for yet, and
// letting go of the ranges when all is there. The reader does it, between events:
// beside it, it would take the CPU from it or from the guest.

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "formats/test_point.h"
#include "restore/page_server.h"

namespace vmsnap {

using State = DecodedExtent::State;

namespace {

// While the guest faults, the fill's pieces stay so small that a fault hardly
// notices them; otherwise they are as large as an extent.
constexpr auto recent = std::chrono::milliseconds(10);
constexpr uint64_t small_piece = 16;
constexpr uint64_t large_piece = DecodedExtent::max_pages;

// After a round that could not read all.
constexpr auto between_rounds = std::chrono::seconds(2);

}  // namespace

// A step of the fill, by the reader, when it has nothing else to do.
Status PageServer::fill_some() {
  stalled_ = false;
  if (!wants_fill() || ms_to_fill() > 0) return {};
  if (!source_ && !start_source()) return {};
  const bool faulted = Clock::now() - last_fault_ < recent;
  VMSNAP_CHECK(fill(faulted ? small_piece : large_piece));
  if (!nothing_left()) return {};
  source_.reset();
  if (std::exchange(skipped_, false)) {
    fill_again_at_ = Clock::now() + between_rounds;
    return {};
  }
  filled_ = true;
  if (options_.prefetch != Prefetch::all) return {};
  VMSNAP_TEST_POINT("restore.filled");
  if (!options_.release) return {};
  VMSNAP_CHECK(release_ranges());
  released_.store(true);
  wake(called_);
  return {};
}

bool PageServer::wants_fill() const {
  return options_.prefetch != Prefetch::none && fill_.load() && !filled_;
}

int PageServer::ms_to_fill() const {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(fill_again_at_ - Clock::now());
  return static_cast<int>(std::max<int64_t>(left.count(), 0));
}

// Waits for events, or for something that can be filled.
Status PageServer::wait_for_work() {
  int timeout_ms = -1;
  if (stalled_) {
    // EAGAIN: the thread that removes memory has yet to run. It needs a CPU.
    timeout_ms = 1;
  } else if (source_ && (extent_ || source_->exhausted())) {
    timeout_ms = 0;
  } else if (!source_ && wants_fill()) {
    timeout_ms = ms_to_fill();
  }
  pollfd fds[] = {{uffd_.fd(), POLLIN, 0},
                  {halt_.get(), POLLIN, 0},
                  {begun_.get(), POLLIN, 0},
                  {source_ && !extent_ ? source_->ready_fd() : -1, POLLIN, 0},
                  {put_off_.fd(), POLLIN, 0}};
  if (::poll(fds, std::size(fds), timeout_ms) < 0 && errno != EINTR) {
    return fail_errno(errno, "cannot wait for page faults");
  }
  if (fds[0].revents & (POLLERR | POLLNVAL)) {
    return fail(ErrorCode::io, "the userfaultfd of {} cannot be waited for", options_.vm);
  }
  if (fds[2].revents) {
    uint64_t ignored;
    [[maybe_unused]] const ssize_t got = ::read(begun_.get(), &ignored, sizeof ignored);
  }
  if (fds[4].revents) queue_faults(put_off_.take());
  return {};
}

// False: there is no room for one now. Faults go on being answered, so this is no
// reason to end.
bool PageServer::start_source() {
  auto source = PageSource::start(reader_, marks_, ranges_, options_.prefetch,
                                  options_.decoder_threads);
  if (source) {
    source_ = *std::move(source);
    return true;
  }
  say_delay(source.error());
  fill_again_at_ = Clock::now() + between_rounds;
  return false;
}

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
  std::shared_lock lock(order_);
  const Piece piece = next_piece(range.unit / page_size, budget);
  switch (piece.state) {
    case State::zero:
      return piece.pages;  // absent is zero, or somebody has it
    case State::later:
      lock.unlock();
      skipped_ = true;
      say_delay(*extent_->delayed);
      return piece.pages;
    case State::unreadable:
      lock.unlock();
      stalled_ = VMSNAP_TRY(give_up(range, first_page, "it is damaged")) == Answer::again;
      return stalled_ ? 0 : piece.pages;
    case State::data:
      break;
  }

  const RemotePtr to = range.address_of(first_page);
  const auto copied =
      VMSNAP_TRY(put(extent_->range, to, extent_->bytes_of(extent_done_, piece.pages)));
  const uint64_t pages = copied.bytes / page_size;
  if (pages > 0) {
    count_filled(filled_by_background_, marks_.set_resolved(first_page, pages));
    return pages;
  }
  const uint64_t unit_pages = range.unit / page_size;
  switch (copied.outcome) {
    case CopyOutcome::already_there:
      // A predecessor was killed between its copy and its mark, or an answerer
      // is there.
      found_filled_.fetch_add(marks_.set_resolved(first_page, unit_pages),
                              std::memory_order_relaxed);
      return unit_pages;
    case CopyOutcome::no_mapping:
      // Unmapped, or the piece reaches over the end of a mapping that was split:
      // then the single page goes in.
      lock.unlock();
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

bool PageServer::nothing_left() const { return !extent_ && source_->exhausted(); }

// All data is in. What is still absent is zero, and is so without us: the
// ranges need not be watched any more. Unregistering wakes who waits; a removal
// that is under way is released by reading its event, which the answerers do
// until the last moment, or by the last close of the userfaultfd. Pages that
// could not even be poisoned stay watched, because nothing else keeps them from
// reading as zero.
Status PageServer::release_ranges() {
  std::lock_guard lock(unreadable_mutex_);
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
  return {};
}

}  // namespace vmsnap
