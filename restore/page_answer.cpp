// The answers of PageServer to faults.

#include "formats/damage.h"
#include "formats/test_point.h"
#include "restore/page_server.h"

namespace vmsnap {

Status PageServer::settle(const Fault& fault, std::span<std::byte> buffer) {
  switch (VMSNAP_TRY(answer(fault, buffer))) {
    case Answer::again:
      postpone(fault);
      return {};
    case Answer::later:
      put_off_.add(fault);
      return {};
    case Answer::done:
      break;
  }
  faults_.fetch_add(1, std::memory_order_relaxed);
  latency_.add(Clock::now() - fault.seen);
  return {};
}

Result<PageServer::Answer> PageServer::answer(const Fault& fault, std::span<std::byte> buffer) {
  if (fault.write_protected) return lift_protection(fault);
  const ServedRange& range = ranges_[fault.range];
  const uint64_t first_page = range.page_at(fault.address);
  Result<bool> has_data = false;
  if (marks_.wanted(first_page)) {
    has_data = read_unit(range, first_page, buffer.first(range.unit));
    if (!has_data && !is_lasting(has_data.error())) {
      say_delay(has_data.error());
      return Answer::later;
    }
    if (!has_data) return give_up(range, first_page, has_data.error().message());
    if (*has_data && options_.recorder) options_.recorder->add(first_page);
  }

  std::shared_lock lock(order_);
  // Given back, perhaps while it was decoded; or given by us and absent again,
  // which no event told of: a hole was punched. If another fault brought the
  // page in, this wakes who waits for this one.
  if (!*has_data || !marks_.wanted(first_page)) return give_zero(fault.range, fault.address);

  const uint64_t pages = range.unit / page_size;
  const auto copied = VMSNAP_TRY(put(fault.range, fault.address, buffer.first(range.unit)));
  switch (copied.outcome) {
    case CopyOutcome::copied:
      count_filled(filled_by_fault_, marks_.set_resolved(first_page, pages));
      return Answer::done;
    case CopyOutcome::already_there:
      count_filled(found_filled_, marks_.set_resolved(first_page, pages));
      [[fallthrough]];
    case CopyOutcome::no_mapping:
    case CopyOutcome::cannot_protect:
      // Nobody was woken. In a mapping that is gone, the waiter's next try fails.
      VMSNAP_CHECK(uffd_.wake({fault.address, range.unit}));
      return Answer::done;
    case CopyOutcome::try_again:
    case CopyOutcome::no_memory:
      return Answer::again;
  }
  return Answer::done;
}

// A write to a page that arrived with the mark: it loses it, which is how the
// VMM sees that the page was written to.
Result<PageServer::Answer> PageServer::lift_protection(const Fault& fault) {
  const RemoteRange unit = {fault.address, ranges_[fault.range].unit};
  switch (VMSNAP_TRY(uffd_.unprotect(unit))) {
    case ProtectOutcome::try_again:
      return Answer::again;
    case ProtectOutcome::no_mapping:
      VMSNAP_CHECK(uffd_.wake(unit));
      break;
    case ProtectOutcome::done:
      break;
  }
  return Answer::done;
}

// False: all of it is zero.
Result<bool> PageServer::read_unit(const ServedRange& range, uint64_t first_page,
                                   std::span<std::byte> buffer) const {
  bool has_data = false;
  for (uint64_t i = 0; i < range.unit / page_size; ++i) {
    const std::span<std::byte, page_size> out(buffer.data() + i * page_size, page_size);
    const PageKind kind = VMSNAP_TRY(reader_.read_page(first_page + i, out));
    if (kind == PageKind::data) has_data = true;
  }
  return has_data;
}

Result<Uffd::Copied> PageServer::put(size_t range, RemotePtr at, std::span<const std::byte> bytes) {
  if (protect_[range].load(std::memory_order_relaxed)) {
    const auto copied = VMSNAP_TRY(uffd_.copy(at, bytes, CopyMode::write_protected));
    if (copied.outcome != CopyOutcome::cannot_protect) return copied;
    if (protect_[range].exchange(false)) {
      say(fmt::format("{}: {} is not registered for write protection "
                      "(UFFDIO_REGISTER_MODE_WP); its pages arrive without",
                      options_.vm, ranges_[range].name));
    }
  }
  return uffd_.copy(at, bytes);
}

Result<PageServer::Answer> PageServer::give_zero(size_t range, RemotePtr at) {
  // UFFDIO_ZEROPAGE knows neither huge pages nor the mark.
  const uint64_t unit = ranges_[range].unit;
  const bool copy = unit != page_size || protect_[range].load(std::memory_order_relaxed);
  const auto given = VMSNAP_TRY(copy ? put(range, at, std::span(zeros_).first(unit))
                                     : uffd_.zero({at, page_size}));
  if (given.outcome == CopyOutcome::try_again || given.outcome == CopyOutcome::no_memory) {
    return Answer::again;
  }
  if (given.outcome != CopyOutcome::copied) VMSNAP_CHECK(uffd_.wake({at, unit}));
  return Answer::done;
}

// A page that cannot be read back must not be invented.
Result<PageServer::Answer> PageServer::give_up(const ServedRange& range, uint64_t first_page,
                                               const std::string& why) {
  std::shared_lock order(order_);
  std::lock_guard lock(unreadable_mutex_);
  if (unreadable_.contains(first_page)) {  // said already
    const RemotePtr at = range.address_of(first_page);
    const bool missing = std::ranges::any_of(
        left_missing_, [&](const RemoteRange& left) { return left.start <= at && at < left.end(); });
    // One that went to sleep while it was being poisoned; where it could not be, who
    // touches it waits.
    if (!missing) VMSNAP_CHECK(uffd_.wake({at, range.unit}));
    return Answer::done;
  }
  if (!marks_.wanted(first_page)) {
    return give_zero(static_cast<size_t>(&range - ranges_.data()), range.address_of(first_page));
  }
  bool poisoned = false;
  if (VMSNAP_TRY(poison(range, first_page, &poisoned)) == Answer::again) return Answer::again;
  unreadable_.insert(first_page);
  say(fmt::format("{}: {} at offset {:#x} of {} cannot be read back: {}. {}", options_.vm,
                  range.unit == page_size ? "the page" : "the huge page",
                  (first_page - range.first_page) * page_size, range.name, why,
                  poisoned ? "It is poisoned: touching it is a memory error."
                           : "This kernel cannot poison it (Linux 6.6): who touches it waits."));
  return Answer::done;
}

// Poisons a unit, or where that cannot be done lists it in left_missing_.
Result<PageServer::Answer> PageServer::poison(const ServedRange& range, uint64_t first_page,
                                              bool* poisoned) {
  const RemoteRange unit = {range.address_of(first_page), range.unit};
  const uint64_t pages = range.unit / page_size;
  if (options_.use_poison) {
    const Result<Uffd::Copied> done = uffd_.poison(unit);
    if (!done && done.error().code() == ErrorCode::vm) return tl::unexpected(done.error());
    if (done) {
      if (done->outcome == CopyOutcome::try_again || done->outcome == CopyOutcome::no_memory) {
        return Answer::again;
      }
      if (done->outcome != CopyOutcome::copied) VMSNAP_CHECK(uffd_.wake(unit));
      poisoned_.fetch_add(pages, std::memory_order_relaxed);
      *poisoned = true;
      return Answer::done;
    }
  }
  left_missing_.push_back(unit);
  missing_.fetch_add(pages, std::memory_order_relaxed);
  return Answer::done;
}

void PageServer::count_filled(std::atomic<uint64_t>& counter, uint64_t pages) {
  counter.fetch_add(pages, std::memory_order_relaxed);
  const uint64_t filled = filled_by_fault_.load(std::memory_order_relaxed) +
                          filled_by_background_.load(std::memory_order_relaxed);
  if (filled * 2 >= data_pages_ && !passed_half_.exchange(true)) {
    VMSNAP_TEST_POINT("restore.half");
  }
}

}  // namespace vmsnap
