#include "restore/page_server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "formats/log.h"
#include "formats/test_point.h"

namespace vmsnap {

namespace {

// While the guest faults, the fill's pieces stay so small that a fault hardly
// notices them; otherwise they are as large as an extent.
constexpr auto recent = std::chrono::milliseconds(10);
constexpr uint64_t small_piece = 16;
constexpr uint64_t large_piece = DecodedExtent::max_pages;

unsigned decoder_threads(unsigned wanted) {
  if (wanted > 0) return wanted;
  const unsigned cpus = std::max(1u, std::thread::hardware_concurrency());
  // One CPU is left to the serving thread.
  return std::clamp(cpus - 1, 1u, 4u);
}

}  // namespace

PageServer::PageServer(const Uffd& uffd, const ImageReader& reader, PageMarks& marks,
                       std::vector<ServedRange> ranges, PageServerOptions options)
    : uffd_(uffd),
      reader_(reader),
      marks_(marks),
      ranges_(std::move(ranges)),
      options_(std::move(options)),
      called_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      fill_(options_.fill),
      data_pages_(reader.summary().page_count - reader.summary().zero_pages) {}

PageServer::~PageServer() = default;

void PageServer::stop() {
  stop_.store(true);
  wake_server();
}

void PageServer::begin_fill() {
  fill_.store(true);
  wake_server();
}

void PageServer::wake_server() const {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t put = ::write(called_.get(), &one, sizeof one);
}

PageServerCounters PageServer::counters() const {
  PageServerCounters counters;
  counters.data_pages = data_pages_;
  counters.filled_by_fault = filled_by_fault_.load(std::memory_order_relaxed);
  counters.filled_by_background = filled_by_background_.load(std::memory_order_relaxed);
  counters.found_filled = found_filled_.load(std::memory_order_relaxed);
  counters.removed = removed_.load(std::memory_order_relaxed);
  counters.poisoned = poisoned_.load(std::memory_order_relaxed);
  counters.left_missing = missing_.load(std::memory_order_relaxed);
  counters.faults = faults_.load(std::memory_order_relaxed);
  counters.fault_us = {latency_.percentile_us(0.50), latency_.percentile_us(0.99),
                       latency_.max_us()};
  return counters;
}

Result<ServeEnd> PageServer::serve() {
  Result<ServeEnd> end = run();
  source_.reset();  // before anything it refers to goes
  // ESRCH in the middle of something is how most deaths show.
  if (!end && end.error().code() == ErrorCode::vm) return ServeEnd::vm_gone;
  return end;
}

Status PageServer::prepare() {
  if (!called_) return fail(ErrorCode::io, "cannot make an eventfd: too many open files");
  // poll(2) on a blocking userfaultfd only ever says POLLERR.
  const int flags = ::fcntl(uffd_.fd(), F_GETFL);
  if (flags < 0 || ::fcntl(uffd_.fd(), F_SETFL, flags | O_NONBLOCK) < 0) {
    return fail_errno(errno, "cannot make the userfaultfd non-blocking");
  }
  // What a predecessor had read when it was killed.
  note_removals(Uffd::parse_messages(marks_.event_buffer()));
  uint64_t largest = page_size;
  for (const ServedRange& range : ranges_) {
    largest = std::max(largest, range.unit);
    VMSNAP_CHECK(uffd_.wake(range.range));
    found_filled_ += marks_.count_resolved(range.first_page, range.page_count());
  }
  buffer_.resize(largest);
  zeros_.resize(largest);
  return {};
}

Status PageServer::start_source() {
  source_ = VMSNAP_TRY(
      PageSource::start(reader_, marks_, ranges_, decoder_threads(options_.decoder_threads)));
  return {};
}

Result<ServeEnd> PageServer::run() {
  VMSNAP_CHECK(prepare());
  for (;;) {
    if (!VMSNAP_TRY(wait_for_work())) {
      return vm_is_gone() ? ServeEnd::vm_gone : ServeEnd::stopped;
    }
    stalled_ = false;
    const size_t events = VMSNAP_TRY(read_events());
    VMSNAP_CHECK(answer_faults());
    if (events > 0 || !waiting_.empty()) continue;
    if (!fill_.load() || filled_) continue;
    if (!source_) VMSNAP_CHECK(start_source());
    VMSNAP_CHECK(fill(Clock::now() - last_fault_ < recent ? small_piece : large_piece));
    if (!nothing_left()) continue;
    source_.reset();
    filled_ = true;
    VMSNAP_TEST_POINT("restore.filled");
    if (!options_.release) continue;
    VMSNAP_CHECK(release_ranges());
    return ServeEnd::filled;
  }
}

Result<bool> PageServer::wait_for_work() {
  const bool to_begin = fill_.load() && !filled_ && !source_;
  const bool can_fill = to_begin || (source_ && (extent_ || source_->exhausted()));
  int timeout_ms = 1000;
  if (!waiting_.empty() || stalled_) {
    // EAGAIN: the thread that removes memory has yet to run. It needs a CPU.
    timeout_ms = 1;
  } else if (can_fill) {
    timeout_ms = 0;
  }
  pollfd fds[4] = {{uffd_.fd(), POLLIN, 0},
                   {called_.get(), POLLIN, 0},
                   {options_.pidfd, POLLIN, 0},
                   {source_ && !extent_ ? source_->ready_fd() : -1, POLLIN, 0}};
  const int ready = ::poll(fds, 4, timeout_ms);
  if (ready < 0 && errno != EINTR) return fail_errno(errno, "cannot wait for page faults");
  if (stop_.load() || fds[2].revents) return false;
  if (fds[1].revents) {
    uint64_t ignored;
    [[maybe_unused]] const ssize_t got = ::read(called_.get(), &ignored, sizeof ignored);
  }
  if (fds[0].revents & (POLLERR | POLLNVAL)) {
    return fail(ErrorCode::io, "the userfaultfd of {} cannot be waited for", options_.vm);
  }
  if (ready == 0 && timeout_ms == 1000 && vm_is_gone()) return false;
  return true;
}

bool PageServer::vm_is_gone() const {
  if (options_.pidfd >= 0) {
    pollfd exited = {options_.pidfd, POLLIN, 0};
    return ::poll(&exited, 1, 0) > 0;
  }
  // No process to watch (another pid namespace): ask the kernel to fill a page
  // at an address where no served range is. ENOENT while the address space is
  // there, ESRCH when it is gone.
  static constexpr RemotePtr nowhere{0x10000};
  size_t unused;
  if (find_range(nowhere, &unused)) return false;
  const auto asked = uffd_.zero({nowhere, page_size}, /*wake=*/false);
  return !asked && asked.error().code() == ErrorCode::vm;
}

bool PageServer::find_range(RemotePtr address, size_t* index) const {
  for (size_t i = 0; i < ranges_.size(); ++i) {
    if (address >= ranges_[i].range.start && address < ranges_[i].range.end()) {
      *index = i;
      return true;
    }
  }
  return false;
}

// Removals are marked before any fault of the batch is answered: a fault that
// comes with the removal of its page may be answered with zeros in either
// order, and one that comes after it must be.
Result<size_t> PageServer::read_events() {
  const auto messages = VMSNAP_TRY(uffd_.read_messages(marks_.event_buffer()));
  const std::vector<UffdEvent> events = Uffd::parse_messages(messages);
  note_removals(events);
  const Clock::time_point now = Clock::now();
  for (const UffdEvent& event : events) {
    if (event.kind == UffdEvent::Kind::missing) {
      size_t index;
      if (!find_range(event.address, &index)) {
        // A VMM that registered more than it told of. It waits for ever, alone.
        log_warning("{} touched {:#x}, which is in no region that it announced", options_.vm,
                    event.address.address());
        continue;
      }
      const ServedRange& range = ranges_[index];
      const uint64_t into = (event.address - range.range.start) / range.unit * range.unit;
      waiting_.push_back({range.range.start + into, index, now});
      last_fault_ = now;
    }
  }
  return events.size();
}

// Marks what the events removed, and then forgets the events.
void PageServer::note_removals(const std::vector<UffdEvent>& events) {
  for (const UffdEvent& event : events) {
    if (event.kind == UffdEvent::Kind::removed || event.kind == UffdEvent::Kind::unmapped) {
      note_removed(event.address, event.length);
    }
  }
  // We may be killed between any two stores: these must not change places.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  const auto done = marks_.event_buffer().first(events.size() * Uffd::message_bytes);
  std::fill(done.begin(), done.end(), std::byte{0});
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

void PageServer::note_removed(RemotePtr start, uint64_t length) {
  for (const ServedRange& range : ranges_) {
    const RemotePtr from = std::max(start, range.range.start);
    const RemotePtr to = std::min(start + length, range.range.end());
    if (from >= to) continue;
    marks_.set_removed(range.page_at(from), (to - from) / page_size);
    removed_.fetch_add((to - from) / page_size, std::memory_order_relaxed);
  }
}

Status PageServer::answer_faults() {
  std::vector<Fault> faults;
  faults.swap(waiting_);
  for (const Fault& fault : faults) {
    if (VMSNAP_TRY(answer(fault)) == Answer::again) {
      waiting_.push_back(fault);
      continue;
    }
    faults_.fetch_add(1, std::memory_order_relaxed);
    latency_.add(Clock::now() - fault.seen);
  }
  return {};
}

Result<PageServer::Answer> PageServer::answer(const Fault& fault) {
  const ServedRange& range = ranges_[fault.range];
  const uint64_t first_page = range.page_at(fault.address);
  // Given back; or given by us and absent again, which no event told of: a hole
  // was punched. If another thread's fault brought the page in, this wakes ours.
  if (!marks_.wanted(first_page)) return give_zero(range, fault.address);

  const Result<bool> has_data = read_unit(range, first_page);
  if (!has_data) return give_up(range, first_page, has_data.error().message());
  if (!*has_data) return give_zero(range, fault.address);

  const uint64_t pages = range.unit / page_size;
  const auto copied = VMSNAP_TRY(uffd_.copy(fault.address, {buffer_.data(), range.unit}));
  switch (copied.outcome) {
    case CopyOutcome::copied:
      marks_.set_resolved(first_page, pages);
      count_filled(filled_by_fault_, pages);
      return Answer::done;
    case CopyOutcome::already_there:
      marks_.set_resolved(first_page, pages);
      count_filled(found_filled_, pages);
      [[fallthrough]];
    case CopyOutcome::no_mapping:
      // Nobody was woken. In a mapping that is gone, the waiter's next try fails.
      VMSNAP_CHECK(uffd_.wake({fault.address, range.unit}));
      return Answer::done;
    case CopyOutcome::try_again:
    case CopyOutcome::no_memory:
      return Answer::again;
  }
  return Answer::done;
}

// Reads one unit into buffer_; false: all of it is zero.
Result<bool> PageServer::read_unit(const ServedRange& range, uint64_t first_page) {
  bool has_data = false;
  for (uint64_t i = 0; i < range.unit / page_size; ++i) {
    const std::span<std::byte, page_size> out(buffer_.data() + i * page_size, page_size);
    const PageKind kind = VMSNAP_TRY(reader_.read_page(first_page + i, out));
    if (kind == PageKind::data) has_data = true;
  }
  return has_data;
}

Result<PageServer::Answer> PageServer::give_zero(const ServedRange& range, RemotePtr at) {
  // UFFDIO_ZEROPAGE knows no huge pages.
  const auto given =
      VMSNAP_TRY(range.unit == page_size ? uffd_.zero({at, page_size})
                                         : uffd_.copy(at, {zeros_.data(), range.unit}));
  if (given.outcome == CopyOutcome::try_again || given.outcome == CopyOutcome::no_memory) {
    return Answer::again;
  }
  if (given.outcome != CopyOutcome::copied) VMSNAP_CHECK(uffd_.wake({at, range.unit}));
  return Answer::done;
}

// A page that cannot be read back must not be invented.
Result<PageServer::Answer> PageServer::give_up(const ServedRange& range, uint64_t first_page,
                                               const std::string& why) {
  const RemoteRange unit = {range.address_of(first_page), range.unit};
  const uint64_t pages = range.unit / page_size;
  if (unreadable_.contains(first_page)) return Answer::done;  // said already
  Result<Uffd::Copied> poisoned = Uffd::Copied{};
  if (options_.use_poison) {
    poisoned = uffd_.poison(unit);
    if (!poisoned && poisoned.error().code() == ErrorCode::vm) {
      return tl::unexpected(poisoned.error());
    }
  }
  if (options_.use_poison && poisoned) {
    if (poisoned->outcome == CopyOutcome::try_again ||
        poisoned->outcome == CopyOutcome::no_memory) {
      return Answer::again;
    }
    if (poisoned->outcome != CopyOutcome::copied) VMSNAP_CHECK(uffd_.wake(unit));
    poisoned_.fetch_add(pages, std::memory_order_relaxed);
  } else {
    left_missing_.push_back(unit);
    missing_.fetch_add(pages, std::memory_order_relaxed);
  }
  unreadable_.insert(first_page);
  log_line(LogLevel::error,
           fmt::format("{}: {} at offset {:#x} of {} cannot be read back: {}. {}", options_.vm,
                       pages == 1 ? "the page" : "the huge page",
                       (first_page - range.first_page) * page_size, range.name, why,
                       options_.use_poison && poisoned
                           ? "It is poisoned: touching it is a memory error."
                           : "This kernel cannot poison it (Linux 6.6): who touches it waits."));
  return Answer::done;
}

void PageServer::count_filled(std::atomic<uint64_t>& counter, uint64_t pages) {
  counter.fetch_add(pages, std::memory_order_relaxed);
  const uint64_t filled = filled_by_fault_.load(std::memory_order_relaxed) +
                          filled_by_background_.load(std::memory_order_relaxed);
  if (!passed_half_ && filled * 2 >= data_pages_) {
    passed_half_ = true;
    VMSNAP_TEST_POINT("restore.half");
  }
}

}  // namespace vmsnap
