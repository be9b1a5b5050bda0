#include "snap/fault_handler.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "formats/test_point.h"

namespace vmsnap {

namespace {

using Clock = std::chrono::steady_clock;
constexpr int idle_ms = 200;  // how often an idle handler gives a sign of life
constexpr int lull_ms = 20;   // how long pages wait for company on their way to a compressor
constexpr uint64_t chunk_bytes = Chunk::capacity * page_size;

}  // namespace

FaultHandler::FaultHandler(CaptureState& state, std::chrono::milliseconds stall_limit,
                           std::function<void()> heartbeat)
    : state_(state), stall_limit_(stall_limit), heartbeat_(std::move(heartbeat)) {}

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
}

void FaultHandler::run() {
  pollfd watched[] = {{state_.uffd.fd(), POLLIN, 0},
                      {stop_.get(), POLLIN, 0},
                      {state_.process.pidfd(), POLLIN, 0}};
  while (!state_.failed()) {
    heartbeat_();
    const auto events = state_.uffd.read_events();
    if (!events) return state_.fail(events.error());
    for (const UffdEvent& event : *events) {
      if (const Status handled = handle(event); !handled) return state_.fail(handled.error());
    }
    if (!events->empty()) continue;
    if (stopping_) break;
    const int ready = ::poll(watched, std::size(watched), chunk_ ? lull_ms : idle_ms);
    if (ready < 0 && errno != EINTR) return state_.fail(Error::from_errno(errno, "poll failed"));
    // A lull: what was copied so far can be compressed.
    if (ready == 0) flush();
    if (watched[2].revents) {
      return state_.fail(Error(ErrorCode::vm, "the VM ended while it was being snapshotted"));
    }
  }
  flush();
}

// A page has its mark before it has its state: an event that comes in between
// (QEMU's own threads run on in a pause) waits until both are there.
Status FaultHandler::handle(const UffdEvent& event) {
  std::lock_guard lock(arming_);
  CapturedPiece* piece = state_.find(event.address);
  if (!piece) return fail(ErrorCode::vm, "a fault outside the captured memory at {:#x}", event.address.address());
  const uint64_t unit = piece->unit_of(event.address);
  switch (event.kind) {
    case UffdEvent::Kind::write_protect: return handle_write(*piece, unit);
    case UffdEvent::Kind::missing: return handle_missing(*piece, unit);
    default: return {};  // not asked for at UFFDIO_API
  }
}

Status FaultHandler::handle_write(CapturedPiece& piece, uint64_t unit) {
  const auto start = Clock::now();
  ++state_.counters.write_faults;
  if (state_.first_written.size() < CaptureState::max_first_written) {
    state_.first_written.push_back(piece.page_of(unit));
  }
  if (piece.states.claim(unit)) {
    VMSNAP_CHECK(copy_unit(piece, unit));
  } else if (piece.states.get(unit) != UnitState::claimed) {
    // Copied and freed since the event was raised: only the wake-up is owed.
    VMSNAP_CHECK(state_.release(piece, unit, 1));
  }
  // Else the sweep has it, and wakes the writer when it frees it.
  state_.counters.fault_latency.add(Clock::now() - start);
  return {};
}

Status FaultHandler::copy_unit(CapturedPiece& piece, uint64_t unit) {
  std::span<std::byte> to;
  for (uint64_t offset = 0; offset < piece.piece.unit_bytes;) {
    Chunk* chunk = VMSNAP_TRY(chunk_with_room());
    const uint64_t bytes = std::min({piece.piece.unit_bytes - offset, chunk_bytes, chunk->free() * page_size});
    to = chunk->add(piece.page_of(unit) + offset / page_size, bytes / page_size);
    VMSNAP_CHECK(state_.copy(piece, unit, offset, to));
    offset += bytes;
  }
  VMSNAP_CHECK(state_.check(piece, unit, 1, piece.piece.unit_bytes == page_size ? to : std::span<std::byte>()));
  if (!first_fault_seen_) {
    first_fault_seen_ = true;
    VMSNAP_TEST_POINT("copy.first_fault");
  }
  VMSNAP_CHECK(state_.release(piece, unit, 1));
  piece.states.set(unit, UnitState::done);
  state_.counters.copied_pages += piece.unit_pages();
  return {};
}

// An absent page of shared memory was touched. Filled with zeros, as the
// kernel would have done without us.
Status FaultHandler::handle_missing(CapturedPiece& piece, uint64_t unit) {
  const UnitState before = piece.states.get(unit);
  if (!armed_) {
    // It holds whatever the guest writes until the instant: to be copied.
    piece.states.set(unit, UnitState::armed);
  } else if (before == UnitState::armed || before == UnitState::claimed) {
    return tl::unexpected(state_.discarded(piece.units(unit, 1).start));
  }
  const RemoteRange range = piece.units(unit, 1);
  for (;;) {
    Uffd::Copied filled;
    if (piece.piece.unit_bytes == page_size) {
      filled = VMSNAP_TRY(state_.uffd.zero(range));
    } else {
      zeros_.resize(piece.piece.unit_bytes);
      filled = VMSNAP_TRY(state_.uffd.copy(range.start, zeros_));
      if (filled.outcome == CopyOutcome::copied) piece.expected_blocks += piece.piece.unit_bytes / 512;
    }
    switch (filled.outcome) {
      case CopyOutcome::copied: return {};
      case CopyOutcome::already_there: return state_.uffd.wake(range);
      case CopyOutcome::try_again: continue;
      case CopyOutcome::no_mapping: return state_.uffd.wake(range);
      case CopyOutcome::no_memory:
        return fail(ErrorCode::vm, "no memory for a page that {} touched", state_.process.describe());
    }
  }
}

// The chunk for single pages, handed on and replaced when it is full. Waiting
// here is the guest waiting: bounded, and noticed.
Result<Chunk*> FaultHandler::chunk_with_room() {
  if (chunk_ && chunk_->free() > 0) return chunk_;
  flush();
  const auto deadline = Clock::now() + stall_limit_;
  while (!state_.failed()) {
    heartbeat_();
    chunk_ = state_.staging->take_empty(Staging::For::fault, std::chrono::milliseconds(idle_ms));
    if (chunk_) return chunk_;
    if (Clock::now() < deadline) continue;
    return tl::unexpected(
        Error(ErrorCode::io, fmt::format("the output did not take data for {} s while the guest waited",
                                         stall_limit_.count() / 1000))
            .with_remedy("The snapshot was given up so that the VM goes on. Write to a faster disk."));
  }
  VMSNAP_CHECK(state_.status());
  return fail(ErrorCode::io, "the capture was stopped");
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
