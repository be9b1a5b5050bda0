// The events of PageServer: who reads them, and what they mean.
//
// One of the answerers is the reader: it waits for events, and settles a fault
// itself as soon as it has read it, because to hand it over would take as long
// as to answer it. When several faults come together, the others go to a queue
// for the rest of the answerers. When the reader is busy with one fault for too
// long, the thread in serve() takes the role from it and gives it to another;
// so a slow page holds up others for some milliseconds.

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "formats/log.h"
#include "formats/thread.h"
#include "restore/page_server.h"
#include "restore/removals.h"

namespace vmsnap {

namespace {

// Looking more often is seen in the p99 of faults: whoever looks takes a CPU.
constexpr auto patience = std::chrono::milliseconds(3);
constexpr size_t events_at_once = 16;

}  // namespace

// One can do it all, only slower. Without any, whoever touches a page waits as for one
// that cannot be read now.
void PageServer::start_answerers() {
  for (;;) {
    auto answerers = start_threads(std::max(1u, options_.fault_threads), [this] { run_answerer(); });
    if (answerers) {
      answerers_ = *std::move(answerers);
      return;
    }
    if (stop_.load() || vm_is_gone()) return;
    say_delay(answerers.error());
    tell();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
}

void PageServer::end_answerers() {
  {
    std::lock_guard lock(queue_mutex_);
    halted_.store(true);
  }
  queue_changed_.notify_all();
  wake(halt_);
  for (std::thread& answerer : answerers_) answerer.join();
  answerers_.clear();
}

void PageServer::run_answerer() {
  const Status ended = answer_until_halted();
  if (ended) return;
  {
    std::lock_guard lock(queue_mutex_);
    if (!failed_) failed_ = ended.error();
  }
  stop();
}

Status PageServer::answer_until_halted() {
  std::vector<std::byte> buffer(zeros_.size());
  std::optional<uint64_t> turn;  // while this is the reader
  while (!halted_.load(std::memory_order_relaxed)) {
    std::optional<Fault> fault;
    if (turn) {
      fault = VMSNAP_TRY(read_fault());
    } else {
      fault = wait_for_turn(turn);
    }
    if (!fault) continue;
    if (turn) begin_answer(*turn);
    VMSNAP_CHECK(settle(*fault, buffer));
    if (turn && !end_answer(*turn)) turn.reset();
  }
  return {};
}

// `turn_` is even while the reader reads and odd while it settles a fault. Only
// the reader makes it odd; from there it or the thread that watches goes on.
void PageServer::begin_answer(uint64_t turn) {
  turn_.store(turn + 1);
  if (!unwatched_.load()) return;
  unwatched_.store(false);
  wake(called_);
}

// False: it was taken for stuck, and another is the reader.
bool PageServer::end_answer(uint64_t& turn) {
  uint64_t expected = turn + 1;
  turn += 2;
  return turn_.compare_exchange_strong(expected, turn);
}

// Until one of the ends. Sees to it that somebody reads.
Result<ServeEnd> PageServer::watch_until_end() {
  constexpr auto seldom = std::chrono::milliseconds(1000);
  Clock::time_point looked = Clock::now();
  for (;;) {
    const auto timeout_ms = static_cast<int>((watch_reader() ? patience : seldom).count());
    pollfd fds[2] = {{called_.get(), POLLIN, 0}, {options_.pidfd, POLLIN, 0}};
    const int ready = ::poll(fds, 2, timeout_ms);
    const int why = errno;
    tell();
    if (ready < 0 && why != EINTR) return fail_errno(why, "cannot wait for page faults");
    if (stop_.load() || fds[1].revents) {
      return vm_is_gone() ? ServeEnd::vm_gone : ServeEnd::stopped;
    }
    if (released_.load()) return ServeEnd::filled;
    if (fds[0].revents) {
      uint64_t ignored;
      [[maybe_unused]] const ssize_t got = ::read(called_.get(), &ignored, sizeof ignored);
    }
    // By the clock: answers may go on after the VM's end, because a fault that is put
    // off is tried again.
    if (options_.pidfd >= 0 || Clock::now() - looked < seldom) continue;
    if (vm_is_gone()) return ServeEnd::vm_gone;
    looked = Clock::now();
  }
}

void PageServer::say_delay(const Error& why) {
  if (delay_.begins()) say(delay_text(options_.vm, why));
}

void PageServer::say(std::string line) {
  {
    std::lock_guard lock(said_mutex_);
    said_.push_back(std::move(line));
  }
  wake(called_);
}

// By the thread in serve(); may block.
void PageServer::tell() {
  std::vector<std::string> lines;
  {
    std::lock_guard lock(said_mutex_);
    lines.swap(said_);
  }
  for (const std::string& line : lines) log_line(LogLevel::error, line);
}

// Called again and again by the thread in serve(), which need not come back
// soon if this says so: the reader wakes it.
bool PageServer::watch_reader() {
  const Clock::time_point now = Clock::now();
  uint64_t turn = turn_.load();
  if (turn != watched_turn_) {
    watched_turn_ = turn;
    watched_since_ = now;
  }
  const auto unchanged = now - watched_since_;
  if (turn % 2 == 0) {
    if (unchanged < 100 * patience) return true;
    unwatched_.store(true);
    return turn_.load() != turn;
  }
  if (unchanged < patience) return true;
  std::lock_guard lock(queue_mutex_);
  // Who answers from the queue looks for the role before the next one: where all wait
  // for a removal to be read (EAGAIN), nobody is ever idle.
  if (idle_answerers_ == 0 && queue_.empty()) return true;
  if (turn_.compare_exchange_strong(turn, turn + 1)) {
    free_turn_ = turn + 1;
    queue_changed_.notify_one();
  }
  return true;
}

// Waits for a fault of the queue, or the reader's role (then `turn` is set and
// there is none). Neither: halted.
std::optional<PageServer::Fault> PageServer::wait_for_turn(std::optional<uint64_t>& turn) {
  std::unique_lock lock(queue_mutex_);
  ++idle_answerers_;
  queue_changed_.wait(lock, [&] { return halted_.load() || free_turn_ || !queue_.empty(); });
  --idle_answerers_;
  if (halted_.load()) return std::nullopt;
  if (free_turn_) {
    turn.swap(free_turn_);
    return std::nullopt;
  }
  return take_queued();
}

// Under queue_mutex_.
std::optional<PageServer::Fault> PageServer::take_queued() {
  if (queue_.empty()) return std::nullopt;
  const Fault fault = queue_.front();
  queue_.pop_front();
  queued_.store(queue_.size(), std::memory_order_relaxed);
  return fault;
}

void PageServer::queue_faults(std::span<const Fault> faults) {
  {
    std::lock_guard lock(queue_mutex_);
    queue_.insert(queue_.end(), faults.begin(), faults.end());
    queued_.store(queue_.size(), std::memory_order_relaxed);
  }
  for (size_t i = 0; i < faults.size(); ++i) queue_changed_.notify_one();
}

void PageServer::postpone(const Fault& fault) {
  // EAGAIN: the thread that removes memory has yet to run. It needs a CPU.
  ::usleep(100);
  queue_faults(std::span(&fault, 1));
}

// The reader: waits for events and fills, and returns a fault to settle. What removals
// tell is marked before anybody copies a page again. Faults of the queue come
// after events, because what the postponed wait for is that a removal is read.
Result<std::optional<PageServer::Fault>> PageServer::read_fault() {
  if (queued_.load(std::memory_order_relaxed) == 0) VMSNAP_CHECK(wait_for_work());
  std::vector<UffdEvent> events;
  {
    std::lock_guard lock(order_);
    const auto buffer = marks_.event_buffer().first(events_at_once * Uffd::message_bytes);
    events = Uffd::parse_messages(VMSNAP_TRY(uffd_.read_messages(buffer)));
    note_removals(events);
  }
  std::vector<Fault> faults;
  for (const UffdEvent& event : events) {
    if (const auto fault = fault_of(event)) faults.push_back(*fault);
  }
  if (faults.empty()) {
    std::unique_lock lock(queue_mutex_);
    const std::optional<Fault> queued = take_queued();
    lock.unlock();
    if (!queued && events.empty()) VMSNAP_CHECK(fill_some());
    return queued;
  }
  if (faults.size() > 1) queue_faults(std::span(faults).subspan(1));
  return faults.front();
}

std::optional<PageServer::Fault> PageServer::fault_of(const UffdEvent& event) {
  const bool write_protected = event.kind == UffdEvent::Kind::write_protect;
  if (event.kind != UffdEvent::Kind::missing && !write_protected) return std::nullopt;
  size_t index;
  if (!find_range(event.address, &index)) {
    // A VMM that registered more than it told of. It waits for ever, alone.
    say(fmt::format("{} touched {:#x}, which is in no region that it announced", options_.vm,
                    event.address.address()));
    return std::nullopt;
  }
  const ServedRange& range = ranges_[index];
  const uint64_t into = (event.address - range.range.start) / range.unit * range.unit;
  const Clock::time_point now = Clock::now();
  last_fault_ = now;
  return Fault{range.range.start + into, index, write_protected, now};
}

// Marks what the events removed, and then forgets the events.
void PageServer::note_removals(const std::vector<UffdEvent>& events) {
  for (const Removal& gone : removals_of(events, ranges_)) {
    marks_.set_removed(gone.first_page, gone.pages);
    removed_.fetch_add(gone.pages, std::memory_order_relaxed);
  }
  marks_.forget_events(events.size() * Uffd::message_bytes);
}

}  // namespace vmsnap
