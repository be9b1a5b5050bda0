#include "restore/farm/farm_server.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "formats/log.h"
#include "formats/thread.h"
#include "restore/removals.h"

namespace vmsnap {

namespace {

// In an epoll event: a clone's number, its highest bit set for the clone's
// pidfd; 0 for our own two eventfds, and this for the timer.
constexpr uint64_t is_pidfd = uint64_t{1} << 63;
constexpr uint64_t is_timer = uint64_t{1} << 62;

unsigned thread_count(unsigned wanted) {
  if (wanted > 0) return wanted;
  // More than CPUs, because they wait for the disk.
  return std::clamp(2 * std::thread::hardware_concurrency(), 4U, 16U);
}

Status watch(int epoll, int fd, uint32_t events, uint64_t data, int operation = EPOLL_CTL_ADD) {
  epoll_event event = {.events = events, .data = {.u64 = data}};
  if (::epoll_ctl(epoll, operation, fd, &event) == 0) return {};
  return fail_errno(errno, "cannot watch a descriptor");
}

}  // namespace

FarmServer::FarmServer(const ImageReader& reader, PageCache& cache, FarmServerOptions options)
    : reader_(reader), cache_(cache), options_(options) {}

FarmServer::~FarmServer() {
  stop_.store(true);
  const uint64_t one = 1;
  if (stopped_) (void)!::write(stopped_.get(), &one, sizeof one);
  for (std::thread& thread : threads_) thread.join();
}

Status FarmServer::prepare() {
  wanted_ = VMSNAP_TRY(PageMarks::in_memory(reader_.page_count()));
  epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  queued_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE));
  stopped_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll_ || !queued_ || !stopped_ || !put_off_.start()) return fail_errno(errno, "cannot make a descriptor");
  VMSNAP_CHECK(watch(epoll_.get(), queued_.get(), EPOLLIN, 0));
  VMSNAP_CHECK(watch(epoll_.get(), stopped_.get(), EPOLLIN, 0));
  return watch(epoll_.get(), put_off_.fd(), EPOLLIN, is_timer);
}

Status FarmServer::start() {
  for (unsigned i = thread_count(options_.threads); i > 0; --i) {
    threads_.push_back(VMSNAP_TRY(start_thread([this] { run_thread(); })));
  }
  if (options_.prefetch == Prefetch::none) return {};
  threads_.push_back(VMSNAP_TRY(start_thread([this] { run_prefetch(); })));
  return {};
}

Status FarmServer::add(CloneToServe what) {
  auto clone = std::make_shared<Clone>(std::move(what));
  const CloneToServe& it = clone->what;
  for (const ServedRange& range : it.ranges) {
    // What it gave back while a predecessor served it.
    uint64_t page = range.first_page;
    for (const uint64_t end = page + range.page_count(); page < end;) {
      uint64_t run = 0;
      while (page + run < end && it.marks.removed(page + run)) ++run;
      if (run > 0) VMSNAP_CHECK(cache_.unshare(page, run));
      page += std::max<uint64_t>(run, 1);
    }
  }
  VMSNAP_CHECK(note_removals(*clone, Uffd::parse_messages(it.marks.event_buffer())));
  {
    std::lock_guard lock(clones_mutex_);
    clone->number = next_number_++;
    clones_[clone->number] = clone;
  }
  VMSNAP_CHECK(watch(epoll_.get(), it.pidfd.get(), EPOLLIN | EPOLLONESHOT, clone->number | is_pidfd));
  VMSNAP_CHECK(watch(epoll_.get(), it.uffd.fd(), EPOLLIN | EPOLLONESHOT, clone->number));
  for (const ServedRange& range : it.ranges) {
    if (const Status woken = it.uffd.wake(range.range); !woken) fail_clone(*clone, woken.error());
  }
  return {};
}

size_t FarmServer::clones() const {
  std::lock_guard lock(clones_mutex_);
  return clones_.size();
}

FarmServer::ClonePtr FarmServer::find(uint64_t number) const {
  std::lock_guard lock(clones_mutex_);
  const auto found = clones_.find(number);
  return found == clones_.end() ? nullptr : found->second;
}

void FarmServer::drop(uint64_t number) {
  const ClonePtr clone = find(number);
  if (!clone) return;
  clone->gone.store(true);
  (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, clone->what.uffd.fd(), nullptr);
  (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, clone->what.pidfd.get(), nullptr);
  std::lock_guard lock(clones_mutex_);
  clones_.erase(number);
}

// The end of a clone shows as ESRCH in the middle of anything.
void FarmServer::fail_clone(Clone& clone, const Error& error) {
  if (error.code() == ErrorCode::vm || clone.gone.exchange(true)) return;
  log_line(LogLevel::error, fmt::format("clone {} is not served any more: {}", clone.what.name, error.message()));
}

nlohmann::json FarmServer::status() const {
  nlohmann::json clones = nlohmann::json::array();
  {
    std::lock_guard lock(clones_mutex_);
    for (const auto& [number, clone] : clones_) {
      clones.push_back({{"name", clone->what.name},
                        {"events", clone->events.load()},
                        {"brought", clone->brought.load()},
                        {"found", clone->found.load()},
                        {"zero", clone->zero.load()},
                        {"alone", clone->alone.load()},
                        {"removed", clone->removed.load()},
                        {"poisoned", clone->poisoned.load()}});
    }
  }
  return {{"clones", std::move(clones)},
          {"data_pages", reader_.page_count() - reader_.summary().zero_pages},
          {"resident_pages", cache_.resident()},
          {"limit_pages", cache_.limit()},
          {"dropped_pages", cache_.dropped()},
          {"read_pages", read_.load()},
          {"read_ahead_pages", read_ahead_.load()},
          {"prefetched_pages", prefetched_.load()},
          {"unreadable_pages", unreadable_.load()},
          {"prefetch_done", prefetch_done_.load()},
          {"faults", latency_.count()},
          {"fault_us",
           {{"p50", latency_.percentile_us(0.50)},
            {"p99", latency_.percentile_us(0.99)},
            {"max", latency_.max_us()}}}};
}

// ---- events -----------------------------------------------------------------

void FarmServer::run_thread() {
  while (!stop_.load()) {
    Fault fault;
    if (pop(&fault)) {
      answer(std::move(fault));
      continue;
    }
    epoll_event event = {};
    if (::epoll_wait(epoll_.get(), &event, 1, -1) < 1) continue;
    if (event.data.u64 == 0) {
      uint64_t ignored;
      (void)!::read(queued_.get(), &ignored, sizeof ignored);
    } else if (event.data.u64 == is_timer) {
      push(put_off_.take());
    } else if (event.data.u64 & is_pidfd) {
      drop(event.data.u64 & ~is_pidfd);
    } else {
      serve_clone(event.data.u64);
    }
  }
}

void FarmServer::serve_clone(uint64_t number) {
  const ClonePtr clone = find(number);
  if (!clone || clone->gone.load()) return;
  std::vector<Fault> faults = read_events(clone);
  // Another thread may read on while this one answers.
  (void)watch(epoll_.get(), clone->what.uffd.fd(), EPOLLIN | EPOLLONESHOT, number, EPOLL_CTL_MOD);
  if (faults.empty()) return;
  Fault first = std::move(faults.back());
  faults.pop_back();
  push(std::move(faults));
  answer(std::move(first));
}

std::vector<FarmServer::Fault> FarmServer::read_events(const ClonePtr& clone) {
  CloneToServe& it = clone->what;
  std::unique_lock alone(clone->order);
  const auto messages = it.uffd.read_messages(it.marks.event_buffer());
  if (!messages) {
    fail_clone(*clone, messages.error());
    return {};
  }
  const std::vector<UffdEvent> events = Uffd::parse_messages(*messages);
  if (const Status noted = note_removals(*clone, events); !noted) fail_clone(*clone, noted.error());
  std::vector<Fault> faults;
  const Clock::time_point now = Clock::now();
  for (const UffdEvent& event : events) {
    if (event.kind != UffdEvent::Kind::missing) continue;
    clone->events.fetch_add(1, std::memory_order_relaxed);
    for (size_t i = 0; i < it.ranges.size(); ++i) {
      const ServedRange& range = it.ranges[i];
      if (event.address < range.range.start || event.address >= range.range.end()) continue;
      faults.push_back({clone, i, range.page_at(event.address), now});
    }
  }
  return faults;
}

Status FarmServer::note_removals(Clone& clone, const std::vector<UffdEvent>& events) {
  for (const Removal& gone : removals_of(events, clone.what.ranges)) {
    clone.what.marks.set_removed(gone.first_page, gone.pages);
    VMSNAP_CHECK(cache_.unshare(gone.first_page, gone.pages));
    clone.removed.fetch_add(gone.pages);  // last: it says that all is done
  }
  clone.what.marks.forget_events(events.size() * Uffd::message_bytes);
  return {};
}

void FarmServer::push(std::vector<Fault> faults) {
  if (faults.empty()) return;
  const uint64_t count = faults.size();
  {
    std::lock_guard lock(queue_mutex_);
    std::move(faults.begin(), faults.end(), std::back_inserter(queue_));
  }
  (void)!::write(queued_.get(), &count, sizeof count);
}

bool FarmServer::pop(Fault* fault) {
  std::lock_guard lock(queue_mutex_);
  if (queue_.empty()) return false;
  *fault = std::move(queue_.back());
  queue_.pop_back();
  return true;
}

}  // namespace vmsnap
