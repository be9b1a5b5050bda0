#include "restore/page_server.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace vmsnap {

PageServer::PageServer(const Uffd& uffd, const ImageReader& reader, PageMarks& marks,
                       std::vector<ServedRange> ranges, PageServerOptions options)
    : uffd_(uffd),
      reader_(reader),
      marks_(marks),
      ranges_(std::move(ranges)),
      options_(std::move(options)),
      called_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      begun_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      halt_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      fill_(options_.prefetch_at_once),
      protect_(new std::atomic<bool>[ranges_.size()]),
      data_pages_(reader.summary().page_count - reader.summary().zero_pages) {}

PageServer::~PageServer() = default;

void PageServer::stop() {
  stop_.store(true);
  wake(called_);
}

void PageServer::begin_fill() {
  fill_.store(true);
  wake(begun_);
}

void PageServer::wake(const Fd& eventfd) {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t put = ::write(eventfd.get(), &one, sizeof one);
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
  end_answerers();
  tell();
  source_.reset();  // before anything it refers to goes
  if (failed_) end = tl::unexpected(*failed_);
  // A removal that came since the last of them looked: who removes waits for it
  // to be read.
  while (end && *end == ServeEnd::filled && !VMSNAP_TRY(uffd_.read_events()).empty()) {
  }
  // ESRCH in the middle of something is how most deaths show.
  if (!end && end.error().code() == ErrorCode::vm) return ServeEnd::vm_gone;
  return end;
}

Result<ServeEnd> PageServer::run() {
  VMSNAP_CHECK(prepare());
  start_answerers();
  return watch_until_end();
}

Status PageServer::prepare() {
  if (!called_ || !begun_ || !halt_ || !put_off_.start()) {
    return fail(ErrorCode::io, "cannot make an eventfd: too many open files");
  }
  VMSNAP_CHECK(uffd_.make_nonblocking());
  // What a predecessor had read when it was killed.
  note_removals(Uffd::parse_messages(marks_.event_buffer()));
  uint64_t largest = page_size;
  for (size_t i = 0; i < ranges_.size(); ++i) {
    const ServedRange& range = ranges_[i];
    largest = std::max(largest, range.unit);
    VMSNAP_CHECK(uffd_.wake(range.range));
    found_filled_ += marks_.count_resolved(range.first_page, range.page_count());
    protect_[i] = options_.write_protect;
  }
  zeros_.resize(largest);
  return {};
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

}  // namespace vmsnap
