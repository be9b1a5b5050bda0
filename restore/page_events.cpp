// The events of PageServer: the threads that read them, and what they mean.
//
// Each thread waits with an epoll(7) of its own for the userfaultfd with
// EPOLLEXCLUSIVE: the kernel wakes one that waits, for each event, and nobody
// hands faults to anybody else on the way.

#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "formats/log.h"
#include "restore/page_server.h"

namespace vmsnap {

namespace {

Status watch(int epoll, int fd, uint32_t events) {
  epoll_event event = {};
  event.events = events;
  event.data.fd = fd;
  if (::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0) return {};
  return fail_errno(errno, "cannot wait for page faults");
}

}  // namespace

Status PageServer::start_answerers() {
  for (unsigned i = 0; i < std::max(1u, options_.fault_threads); ++i) {
    Fd events(::epoll_create1(EPOLL_CLOEXEC));
    if (!events) return fail_errno(errno, "cannot wait for page faults");
    VMSNAP_CHECK(watch(events.get(), uffd_.fd(), EPOLLIN | EPOLLEXCLUSIVE));
    VMSNAP_CHECK(watch(events.get(), postponed_ready_.get(), EPOLLIN | EPOLLEXCLUSIVE));
    VMSNAP_CHECK(watch(events.get(), halt_.get(), EPOLLIN));
    answerer_events_.push_back(std::move(events));
  }
  for (const Fd& events : answerer_events_) {
    answerers_.emplace_back([this, &events] { run_answerer(events); });
  }
  return {};
}

void PageServer::end_answerers() {
  halted_.store(true);
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t put = ::write(halt_.get(), &one, sizeof one);
  for (std::thread& answerer : answerers_) answerer.join();
  answerers_.clear();
}

void PageServer::run_answerer(const Fd& events) {
  const Status ended = answer_until_halted(events);
  if (ended) return;
  {
    std::lock_guard lock(fault_mutex_);
    if (!failed_) failed_ = ended.error();
  }
  stop();
}

Status PageServer::answer_until_halted(const Fd& events) {
  std::vector<std::byte> buffer(zeros_.size());
  while (VMSNAP_TRY(wait_for_events(events))) {
    while (!halted_.load(std::memory_order_relaxed)) {
      const std::optional<Fault> fault = VMSNAP_TRY(next_fault());
      if (!fault) break;
      VMSNAP_CHECK(settle(*fault, buffer));
    }
  }
  return {};
}

// False: to end.
Result<bool> PageServer::wait_for_events(const Fd& events) {
  epoll_event ready[3];
  const int count = ::epoll_wait(events.get(), ready, 3, -1);
  if (count < 0 && errno != EINTR) return fail_errno(errno, "cannot wait for page faults");
  for (int i = 0; i < count; ++i) {
    if (ready[i].data.fd == uffd_.fd() && (ready[i].events & EPOLLERR)) {
      return fail(ErrorCode::io, "the userfaultfd of {} cannot be waited for", options_.vm);
    }
  }
  return !halted_.load();
}

// Reads on until there is a fault: the removals in between are marked before
// anybody copies a page again. Those that were postponed come last, because
// what they wait for is that a removal is read.
Result<std::optional<PageServer::Fault>> PageServer::next_fault() {
  for (;;) {
    std::unique_lock lock(order_);
    const auto buffer = marks_.event_buffer().first(Uffd::message_bytes);
    const auto message = VMSNAP_TRY(uffd_.read_messages(buffer));
    if (message.empty()) break;
    const std::vector<UffdEvent> events = Uffd::parse_messages(message);
    note_removals(events);
    lock.unlock();
    if (std::optional<Fault> fault = fault_of(events.front())) return fault;
  }
  return postponed_fault();
}

std::optional<PageServer::Fault> PageServer::fault_of(const UffdEvent& event) {
  const bool write_protected = event.kind == UffdEvent::Kind::write_protect;
  if (event.kind != UffdEvent::Kind::missing && !write_protected) return std::nullopt;
  size_t index;
  if (!find_range(event.address, &index)) {
    // A VMM that registered more than it told of. It waits for ever, alone.
    log_warning("{} touched {:#x}, which is in no region that it announced", options_.vm,
                event.address.address());
    return std::nullopt;
  }
  const ServedRange& range = ranges_[index];
  const uint64_t into = (event.address - range.range.start) / range.unit * range.unit;
  const Clock::time_point now = Clock::now();
  last_fault_.store(now, std::memory_order_relaxed);
  return Fault{range.range.start + into, index, write_protected, now};
}

std::optional<PageServer::Fault> PageServer::postponed_fault() {
  std::lock_guard lock(fault_mutex_);
  uint64_t ignored;
  [[maybe_unused]] const ssize_t got = ::read(postponed_ready_.get(), &ignored, sizeof ignored);
  if (postponed_.empty()) return std::nullopt;
  const Fault fault = postponed_.front();
  postponed_.pop_front();
  return fault;
}

void PageServer::postpone(const Fault& fault) {
  // EAGAIN: the thread that removes memory has yet to run. It needs a CPU.
  ::usleep(100);
  std::lock_guard lock(fault_mutex_);
  postponed_.push_back(fault);
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t put = ::write(postponed_ready_.get(), &one, sizeof one);
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

}  // namespace vmsnap
