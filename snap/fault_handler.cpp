#include "snap/fault_handler.h"

#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <thread>
#include <utility>

#include "formats/test_point.h"
#include "snap/thread_priority.h"
#include "snap/ticks.h"
#include "snap/window_copy.h"

namespace vmsnap {

namespace {

constexpr int longest_idle_ms = 200;  // between an idle handler's signs of life
constexpr int lull_ms = 20;   // how long pages wait for company on their way to a compressor
constexpr uint64_t chunk_bytes = Chunk::capacity * page_size;
constexpr std::chrono::microseconds early_wait{20};
constexpr std::chrono::milliseconds between_looks{1};  // at where the writer runs, which takes 10 us
// Pages. To copy eight takes 4 us longer than to copy one, which only pays for a
// guest that goes on writing near by: where another write to the region has waited.
constexpr uint64_t neighbours = 8;
constexpr uint64_t region_pages = 16;
constexpr uint64_t max_ahead = 32;  // pages that are dealt with before they are asked for

}  // namespace

FaultHandler::FaultHandler(CaptureState& state, bool keep_huge, std::chrono::milliseconds stall_limit,
                           std::function<void()> heartbeat)
    : state_(state), keep_huge_(keep_huge), stall_limit_(stall_limit),
      idle_ms_(static_cast<int>(std::clamp<int64_t>(stall_limit.count() / 4, 1, longest_idle_ms))),
      heartbeat_(std::move(heartbeat)) {
  // To grow it would copy megabytes while a writer waits.
  state_.first_written.reserve(CaptureState::max_first_written);
  recent_regions_.fill(UINT64_MAX);
}

FaultHandler::~FaultHandler() {
  if (chunk_) state_.staging->give_back(chunk_);
}

Status FaultHandler::prepare() {
  stop_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!stop_) return fail_errno(errno, "cannot make an eventfd");
  return {};
}

void FaultHandler::request_stop() {
  stopping_ = true;
  const uint64_t one = 1;
  (void)!::write(stop_.get(), &one, sizeof one);
  if (const pid_t thread = thread_) Ticks::interrupt(thread);
}

void FaultHandler::run() {
  prefer_this_thread();
  thread_ = ::gettid();
  Status answered = answer_by_poll(Until::instant);
  if (answered) answered = answer_by_read();
  if (answered) answered = answer_the_rest();
  thread_ = 0;
  if (!answered) return state_.fail(answered.error());
  hand_on_staged();
}

// Until the first write after the instant.
Status FaultHandler::answer_by_poll(Until end) {
  pollfd watched[] = {{state_.uffd.fd(), POLLIN, 0},
                      {stop_.get(), POLLIN, 0},
                      {state_.process.pidfd(), POLLIN, 0}};
  while (!state_.failed() && !stopping_ && !(end == Until::instant && at_instant_)) {
    heartbeat_();
    const int ready = ::poll(watched, std::size(watched), has_staged() ? std::min(lull_ms, idle_ms_) : idle_ms_);
    if (ready < 0 && errno != EINTR) return fail_errno(errno, "poll failed");
    // Without looking whether there is more: a writer that was woken may wait for
    // this processor.
    if (ready > 0 && watched[0].revents && VMSNAP_TRY(answer_events()) > 0) continue;
    VMSNAP_CHECK(look_around());
    if (ready == 0) hand_on_staged();
  }
  return {};
}

// In read(2) itself, which is 1 us sooner there than poll(2) and read(2): a sixth of
// what a writer waits.
Status FaultHandler::answer_by_read() {
  auto ticks = Ticks::start(std::chrono::milliseconds(std::min(lull_ms, idle_ms_)));
  if (!ticks) return answer_by_poll(Until::stopped);  // RLIMIT_SIGPENDING
  VMSNAP_CHECK(state_.uffd.make_blocking());
  bool lull = false;
  while (!state_.failed() && !stopping_) {
    if (const auto event = VMSNAP_TRY(state_.uffd.wait_for_event())) {
      VMSNAP_CHECK(handle(*event));
      processor_.store(::sched_getcpu(), std::memory_order_relaxed);
      last_writer_.store(event->thread, std::memory_order_relaxed);
      lull = false;
    }
    if (!ticks->take()) continue;
    VMSNAP_CHECK(look_around());
    // A lull: what was copied so far can be compressed.
    if (lull) hand_on_staged();
    lull = true;
  }
  return {};
}

Status FaultHandler::answer_the_rest() {
  VMSNAP_CHECK(state_.uffd.make_nonblocking());
  while (!state_.failed() && VMSNAP_TRY(answer_events()) > 0) {
  }
  return {};
}

Status FaultHandler::look_around() {
  heartbeat_();
  if (stopping_) return {};  // all is copied: the VM may end
  if (!state_.process.alive()) return fail(ErrorCode::vm, "the VM ended while it was being snapshotted");
  return check_sweeps_wait();
}

bool FaultHandler::has_staged() const {
  std::lock_guard lock(state_.arming);
  return chunk_ != nullptr;
}

void FaultHandler::hand_on_staged() {
  std::lock_guard lock(state_.arming);
  flush();
}

Result<size_t> FaultHandler::answer_events() {
  if (state_.early_writes_wait && !at_instant_) std::this_thread::sleep_for(early_wait);
  std::lock_guard lock(state_.arming);
  at_instant_ = state_.armed;
  const auto events = VMSNAP_TRY(at_instant_ ? state_.uffd.read_events(1) : state_.uffd.read_events());
  for (const UffdEvent& event : events) VMSNAP_CHECK(handle(event));
  return events.size();
}

// A writer that waits has left its processor: who is woken there has it at once, and
// so has the writer after that. Elsewhere each of both must get one from a compressor
// first, or one that is idle must be woken (60 us instead of 10 on two processors of a
// virtual machine), and the scheduler likes to leave threads where they are.
void FaultHandler::follow_writer() {
  if (last_writer_.load(std::memory_order_relaxed) == 0) return;
  const auto now = Clock::now().time_since_epoch();
  auto next = next_look_.load(std::memory_order_relaxed);
  if (now < next || !next_look_.compare_exchange_strong(next, now + between_looks)) return;
  const pid_t thread = thread_, writer = last_writer_.exchange(0);
  if (thread == 0 || writer == 0) return;
  const auto processor = state_.process.last_processor(writer);
  if (processor && *processor != processor_) move_to(thread, *processor);
}

Status FaultHandler::handle(const UffdEvent& event) {
  CapturedPiece* piece = state_.find(event.address);
  if (!piece) return fail(ErrorCode::vm, "a fault outside the captured memory at {:#x}", event.address.address());
  const uint64_t unit = piece->unit_of(event.address);
  switch (event.kind) {
    case UffdEvent::Kind::write_protect:
      if (state_.armed) return handle_write(*piece, unit);
      return let_through(*piece, unit);
    case UffdEvent::Kind::missing: return handle_missing(*piece, unit);
    default: return {};  // not asked for at UFFDIO_API
  }
}

// The instant is not yet: whoever writes shall write.
Status FaultHandler::let_through(CapturedPiece& piece, uint64_t unit) {
  ++state_.counters.early_writes;
  CapturedPiece::Window free = piece.window(unit);
  if (!piece.is_huge(unit)) {
    free = {unit, unit + early_.at(piece.page_of(unit), free.end - unit)};
  }
  // Noted first: a page that is free and not noted would be lost.
  state_.let_through.push_back({&piece, free.first, free.end - free.first});
  return state_.release(piece, free.first, free.end - free.first);
}

Status FaultHandler::handle_write(CapturedPiece& piece, uint64_t unit) {
  const auto start = Clock::now();
  ++state_.counters.write_faults;
  VMSNAP_TEST_POINT("copy.fault");
  if (state_.first_written.size() < CaptureState::max_first_written) {
    state_.first_written.push_back(piece.page_of(unit));
  }
  switch (piece.states.get(unit)) {
    case UnitState::zero: VMSNAP_CHECK(state_.release(piece, unit, 1)); break;
    case UnitState::armed:
      VMSNAP_CHECK(piece.piece.unit_bytes == page_size ? copy_pages(piece, unit) : copy_large_unit(piece, unit));
      break;
    case UnitState::claimed:  // by the sweep, which wakes the writer when it frees the page
      if (!sweeps_.piece) sweeps_ = {&piece, unit, start};
      break;
    case UnitState::done:  // copied and freed since the event was raised: only the wake-up is owed.
      // To free the page alone once more would split a huge page.
      VMSNAP_CHECK(state_.uffd.wake(piece.units(unit, 1)));
      break;
  }
  ++state_.writers_woken;
  state_.counters.fault_latency.add(Clock::now() - start);
  return {};
}

uint64_t FaultHandler::Ahead::at(uint64_t page, uint64_t limit) {
  count_ = page == next_ ? std::min(count_ * 2, max_ahead) : 1;
  const uint64_t pages = std::min(count_, limit);
  next_ = page + pages;
  return pages;
}

// Notes it, too.
bool FaultHandler::is_near_recent(uint64_t page) {
  const uint64_t region = page / region_pages;
  return std::exchange(recent_regions_[region % recent_regions_.size()], region) == region;
}

// What is copied together with a page that is waited for. If nobody need wait for
// room, all of a huge page that is one still, else a few neighbours if they are
// likely to be written soon. And what comes next, if this page came right after
// the last ones.
CapturedPiece::Window FaultHandler::around(const CapturedPiece& piece, uint64_t unit) {
  const CapturedPiece::Window window = piece.window(unit);
  const uint64_t end = unit + ahead_.at(piece.page_of(unit), window.end - unit);
  if (!state_.staging->has_plenty()) return {unit, end};
  if (keep_huge_ && piece.is_whole(unit)) return window;
  const bool goes_on = end > unit + 1;
  if (!is_near_recent(piece.page_of(unit)) && !goes_on) return {unit, end};
  const uint64_t first = unit - (unit - window.first) % neighbours;
  const uint64_t last = std::max(end, std::min(first + neighbours, window.end));
  ahead_.reached(piece.page_of(last));
  return {first, last};
}

Status FaultHandler::copy_pages(CapturedPiece& piece, uint64_t unit) {
  const CapturedPiece::Window window = around(piece, unit);
  Chunk* chunk = VMSNAP_TRY(chunk_with_room(window.end - window.first));
  return copy_window(state_, piece, window.first, window.end, *chunk);
}

Status FaultHandler::copy_large_unit(CapturedPiece& piece, uint64_t unit) {
  if (!piece.states.claim(unit)) return {};
  for (uint64_t offset = 0; offset < piece.piece.unit_bytes;) {
    Chunk* chunk = VMSNAP_TRY(chunk_with_room(1));
    const uint64_t bytes = std::min({piece.piece.unit_bytes - offset, chunk_bytes, chunk->free() * page_size});
    const std::span<std::byte> to = chunk->add(piece.page_of(unit) + offset / page_size, bytes / page_size);
    VMSNAP_CHECK(state_.copy(piece, unit, offset, to));
    offset += bytes;
  }
  return free_large_unit(state_, piece, unit);
}

// An absent page of shared memory was touched. Filled with zeros, as the
// kernel would have done without us.
Status FaultHandler::handle_missing(CapturedPiece& piece, uint64_t unit) {
  const UnitState before = piece.states.get(unit);
  if (!state_.armed) {
    // It holds whatever the guest writes until the instant: to be copied.
    piece.states.set(unit, UnitState::armed);
    state_.let_through.push_back({&piece, unit, 1});
  } else if (before == UnitState::armed || before == UnitState::claimed) {
    return tl::unexpected(state_.discarded(piece.units(unit, 1).start));
  }
  const RemoteRange range = piece.units(unit, 1);
  for (;;) {
    Uffd::Copied filled;
    if (piece.piece.unit_bytes == page_size) {
      filled = VMSNAP_TRY(state_.uffd.zero(range));
    } else {
      const uint64_t bytes = piece.piece.unit_bytes;
      if (!zeros_ || zeros_->bytes().size() < bytes) zeros_ = VMSNAP_TRY(ZeroMemory::create(bytes));
      filled = VMSNAP_TRY(state_.uffd.copy(range.start, zeros_->bytes().first(bytes)));
      if (filled.outcome == CopyOutcome::copied) piece.expected_blocks += piece.piece.unit_bytes / 512;
    }
    switch (filled.outcome) {
      case CopyOutcome::copied: return {};
      case CopyOutcome::already_there: return state_.uffd.wake(range);
      case CopyOutcome::try_again: continue;
      case CopyOutcome::no_mapping:
      case CopyOutcome::cannot_protect: return state_.uffd.wake(range);
      case CopyOutcome::no_memory:
        return fail(ErrorCode::vm, "no memory for a page that {} touched", state_.process.describe());
    }
  }
}

// The chunk, handed on and replaced when `pages` more do not fit. Waiting here is
// the guest waiting: bounded, and noticed.
Result<Chunk*> FaultHandler::chunk_with_room(size_t pages) {
  if (chunk_ && chunk_->free() >= pages) return chunk_;
  flush();
  const auto deadline = Clock::now() + stall_limit_;
  while (!state_.failed()) {
    heartbeat_();
    chunk_ = state_.staging->take_empty(std::chrono::milliseconds(idle_ms_));
    if (chunk_) return chunk_;
    if (Clock::now() < deadline) continue;
    return stalled();
  }
  VMSNAP_CHECK(state_.status());
  return fail(ErrorCode::io, "the capture was stopped");
}

tl::unexpected<Error> FaultHandler::stalled() const {
  return tl::unexpected(
      Error(ErrorCode::io, fmt::format("the output did not take data for {:.1f} s while the guest waited",
                                       static_cast<double>(stall_limit_.count()) / 1000))
          .with_remedy("The snapshot was given up so that the VM goes on. Write to a faster disk."));
}

// The sweep writes in the middle of a unit that is larger than its chunk: then a
// writer that waits for the unit waits for the disk.
Status FaultHandler::check_sweeps_wait() {
  std::lock_guard lock(state_.arming);
  if (!sweeps_.piece || sweeps_.piece->states.get(sweeps_.unit) != UnitState::claimed) {
    sweeps_ = {};
    return {};
  }
  if (Clock::now() - sweeps_.since > stall_limit_) return stalled();
  return {};
}

void FaultHandler::flush() {
  if (!chunk_) return;
  if (chunk_->size() > 0) {
    state_.staging->hand_on(chunk_);
  } else {
    state_.staging->give_back(chunk_);
  }
  chunk_ = nullptr;
}

}  // namespace vmsnap
