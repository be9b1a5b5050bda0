// What FarmServer does about one fault, and the prefetch.

#include <poll.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "formats/damage.h"
#include "formats/log.h"
#include "restore/farm/farm_server.h"

namespace vmsnap {

namespace {

// Zeros cost no memory, only the entry in a page table: a fault for 64 KiB.
constexpr uint64_t zero_window = 16;
// Read ahead when the page before is there, too.
constexpr uint64_t ahead = 8;
// After a round of the prefetch that could not read all.
constexpr int between_rounds_ms = 2000;

using PageBuffer = std::array<std::byte, page_size>;

}  // namespace

void FarmServer::answer(Fault fault) {
  for (;;) {
    if (fault.clone->gone.load() || stop_.load()) return;
    const Result<Answer> outcome = try_answer(fault);
    if (!outcome) return fail_clone(*fault.clone, outcome.error());
    if (*outcome == Answer::left) return;
    if (*outcome == Answer::later) return put_off_.add(std::move(fault));
    if (*outcome == Answer::done) break;
    // EAGAIN: the clone's thread that removes memory has yet to run, or there
    // is an event to read first.
    push(read_events(fault.clone));
    ::usleep(200);
  }
  latency_.add(Clock::now() - fault.seen);
}

Result<FarmServer::Answer> FarmServer::try_answer(const Fault& fault) {
  Clone& clone = *fault.clone;
  if (clone.what.marks.removed(fault.page)) return give_zero(fault);
  const bool shared = cache_.is_shared(fault.page);
  if (shared && cache_.contains(fault.page)) {
    clone.found.fetch_add(1, std::memory_order_relaxed);
    return wake(fault);
  }
  if (!in_flight_.begin(fault.page, fault)) return Answer::left;
  // It may have come since we looked.
  const bool there = shared && cache_.contains(fault.page);
  const Result<Answer> brought = there ? wake(fault) : bring(fault);
  for (Fault& waiter : in_flight_.end(fault.page)) answer(std::move(waiter));
  if (brought && *brought == Answer::done && shared) read_ahead(fault.page);
  return brought;
}

// Reads the page, and gives it to all, or to this clone alone.
Result<FarmServer::Answer> FarmServer::bring(const Fault& fault) {
  PageBuffer bytes;
  const Result<PageKind> kind = reader_.read_page(fault.page, bytes);
  if (!kind && !is_lasting(kind.error())) {
    log_delay(delay_, "the clones", kind.error());
    return Answer::later;
  }
  if (!kind) return give_up(fault, kind.error());
  if (*kind == PageKind::zero) {
    // Before the clone goes on, and asks for the next of them.
    give_zero_around(fault);
    return give_zero(fault);
  }
  read_.fetch_add(1, std::memory_order_relaxed);
  switch (VMSNAP_TRY(cache_.put(fault.page, bytes))) {
    case PageCache::Put::no_memory:
      return Answer::again;
    case PageCache::Put::not_shared:
      return give_alone(fault, bytes);
    case PageCache::Put::done:
      break;
  }
  wanted_.set_resolved(fault.page, 1);
  fault.clone->brought.fetch_add(1, std::memory_order_relaxed);
  return wake(fault);
}

Result<FarmServer::Answer> FarmServer::wake(const Fault& fault) {
  const CloneToServe& clone = fault.clone->what;
  VMSNAP_CHECK(clone.uffd.wake({clone.ranges[fault.range].address_of(fault.page), page_size}));
  return Answer::done;
}

Result<FarmServer::Answer> FarmServer::give_alone(const Fault& fault, std::span<const std::byte> bytes) {
  Clone& clone = *fault.clone;
  const RemotePtr at = clone.what.ranges[fault.range].address_of(fault.page);
  Uffd::Copied copied;
  {
    std::shared_lock before_or_after_a_removal(clone.order);
    if (!clone.what.marks.removed(fault.page)) copied = VMSNAP_TRY(clone.what.uffd.copy(at, bytes));
    else copied = VMSNAP_TRY(clone.what.uffd.zero({at, page_size}));
  }
  switch (copied.outcome) {
    case CopyOutcome::try_again:
    case CopyOutcome::no_memory:
      return Answer::again;
    case CopyOutcome::copied:
      clone.alone.fetch_add(1, std::memory_order_relaxed);
      return Answer::done;
    default:
      return wake(fault);
  }
}

Result<FarmServer::Answer> FarmServer::give_zero(const Fault& fault) {
  Clone& clone = *fault.clone;
  const RemotePtr at = clone.what.ranges[fault.range].address_of(fault.page);
  const Uffd::Copied given = VMSNAP_TRY(clone.what.uffd.zero({at, page_size}));
  if (given.outcome == CopyOutcome::try_again || given.outcome == CopyOutcome::no_memory) {
    return Answer::again;
  }
  clone.zero.fetch_add(1, std::memory_order_relaxed);
  if (given.outcome != CopyOutcome::copied) return wake(fault);
  return Answer::done;
}

// The neighbours that are zero, too, so that they need no event. A hint: what
// does not work now comes by its own fault.
void FarmServer::give_zero_around(const Fault& fault) {
  const CloneToServe& clone = fault.clone->what;
  const ServedRange& range = clone.ranges[fault.range];
  const uint64_t start = std::max(range.first_page, fault.page / zero_window * zero_window);
  const uint64_t end = std::min(range.first_page + range.page_count(), start + zero_window);
  for (uint64_t page = start; page < end; ++page) {
    if (page == fault.page) continue;
    const auto kind = reader_.page_kind(page);
    if (!kind || *kind != PageKind::zero) continue;
    const auto given = clone.uffd.zero({range.address_of(page), page_size}, /*wake=*/false);
    if (!given || given->outcome == CopyOutcome::try_again) return;
  }
}

// A page that cannot be read back must not be invented.
Result<FarmServer::Answer> FarmServer::give_up(const Fault& fault, const Error& why) {
  Clone& clone = *fault.clone;
  const ServedRange& range = clone.what.ranges[fault.range];
  Result<Uffd::Copied> given = Uffd::Copied{};
  {
    std::shared_lock before_or_after_a_removal(clone.order);
    if (clone.what.marks.removed(fault.page)) return give_zero(fault);
    given = clone.what.uffd.poison({range.address_of(fault.page), page_size});
  }
  if (!given && given.error().code() == ErrorCode::vm) return tl::unexpected(given.error());
  if (given && (given->outcome == CopyOutcome::try_again || given->outcome == CopyOutcome::no_memory)) {
    return Answer::again;
  }
  clone.poisoned.fetch_add(1, std::memory_order_relaxed);
  unreadable_.fetch_add(1, std::memory_order_relaxed);
  log_line(LogLevel::error,
           fmt::format("clone {}: the page at offset {:#x} of {} cannot be read back: {}. {}",
                       clone.what.name, (fault.page - range.first_page) * page_size, range.name,
                       why.message(),
                       given ? "It is poisoned: touching it is a memory error."
                             : "This kernel cannot poison it (Linux 6.6): who touches it waits."));
  if (given && given->outcome != CopyOutcome::copied) return wake(fault);
  return Answer::done;
}

// A guest that reads on from page to page waits for one in eight.
void FarmServer::read_ahead(uint64_t page) {
  if (page == 0 || cache_.room() < ahead || !cache_.contains(page - 1)) return;
  PageBuffer bytes;
  const uint64_t end = std::min(reader_.page_count(), page + ahead);
  for (uint64_t next = page + 1; next < end && !stop_.load(); ++next) {
    if (!in_flight_.begin(next)) continue;
    const auto kind = cache_.contains(next) ? PageKind::zero : reader_.read_page(next, bytes);
    if (kind && *kind == PageKind::data) {
      read_.fetch_add(1, std::memory_order_relaxed);
      const auto put = cache_.put(next, bytes);
      if (put && *put == PageCache::Put::done) {
        read_ahead_.fetch_add(1, std::memory_order_relaxed);
        wanted_.set_resolved(next, 1);
      }
    }
    // Their own way to an answer, whatever became of this.
    push(in_flight_.end(next));
  }
}

// ---- prefetch -----------------------------------------------------------------

void FarmServer::run_prefetch() {
  ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), 5);
  for (const auto& [first, count] : cache_.present()) wanted_.set_resolved(first, count);
  for (;;) {
    const Result<bool> all_read = prefetch_round();
    if (!all_read) {
      return log_warning("nothing more is loaded ahead: {}", all_read.error().message());
    }
    if (*all_read) break;
    pollfd wait = {stopped_.get(), POLLIN, 0};
    ::poll(&wait, 1, between_rounds_ms);
  }
  prefetch_done_.store(true);
}

// True: nothing is left to load, or no room. False: some could not be read now.
Result<bool> FarmServer::prefetch_round() {
  // As if all of the image were one range.
  const std::vector<ServedRange> all = {
      {{RemotePtr(page_size), reader_.page_count() * page_size}, 0, page_size, "the image"}};
  const auto source =
      VMSNAP_TRY(PageSource::start(reader_, wanted_, all, options_.prefetch, /*threads=*/0));
  bool all_read = true;
  while (!stop_.load() && !source->exhausted() && cache_.room() > DecodedExtent::max_pages) {
    DecodedExtent* extent = source->take();
    if (!extent) {
      pollfd waits[2] = {{source->ready_fd(), POLLIN, 0}, {stopped_.get(), POLLIN, 0}};
      ::poll(waits, 2, 1000);
      continue;
    }
    if (extent->delayed) {
      all_read = false;
      log_delay(delay_, "the clones", *extent->delayed);
    }
    const Status put = prefetch_extent(*extent);
    source->give_back(extent);
    VMSNAP_CHECK(put);
  }
  return all_read || stop_.load();
}

// In small pieces: faults are put in between.
Status FarmServer::prefetch_extent(const DecodedExtent& extent) {
  constexpr uint64_t piece = 16;
  for (uint64_t i = 0; i < extent.pages && !stop_.load();) {
    uint64_t run = 0;
    while (run < piece && i + run < extent.pages &&
           extent.states[i + run] == DecodedExtent::State::data) {
      ++run;
    }
    if (run > 0) {
      const auto put = VMSNAP_TRY(cache_.put(extent.first_page + i, extent.bytes_of(i, run)));
      if (put == PageCache::Put::no_memory) ::usleep(10000);
      else wanted_.set_resolved(extent.first_page + i, run);
      read_.fetch_add(run, std::memory_order_relaxed);
      prefetched_.fetch_add(run, std::memory_order_relaxed);
    }
    i += std::max<uint64_t>(run, 1);
  }
  return {};
}

}  // namespace vmsnap
