#include "restore/farm/farm_keeper.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <optional>

#include "formats/descriptor_limit.h"
#include "formats/elapsed.h"
#include "formats/log.h"
#include "restore/background.h"
#include "restore/farm/farm_link.h"
#include "restore/farm/page_worker.h"
#include "restore/record_fields.h"
#include "snap/vmm/handover.h"

namespace vmsnap {

namespace {

using Clock = std::chrono::steady_clock;

class Keeper {
 public:
  Keeper(FarmSetup setup, Fd listener, Fd first)
      : setup_(std::move(setup)), listener_(std::move(listener)) {
    connections_.push_back(std::move(first));
  }

  Status take_up(const std::string& name);
  Status run();

 private:
  Status start_worker();
  void see_after_worker();
  Status wait();
  void accept_one();
  bool serve_connection(int socket);
  Result<LinkMessage> answer(const nlohmann::json& request);
  void bury_the_dead();
  void note_unreadable();

  FarmSetup setup_;
  Fd listener_;
  std::vector<Fd> connections_;
  std::vector<KeptClone> clones_;
  pid_t worker_ = -1;
  PageWorkerLink link_;
  Clock::time_point worker_started_;
  uint64_t restarts_ = 0;
  uint64_t unreadable_before_ = 0;  // noted of page servers that are dead
  int quick_deaths_ = 0;
};

// Believes nothing of the clone's directory that it has not checked, and
// nothing of its name.
Status Keeper::take_up(const std::string& name) {
  const std::vector<std::string> there = setup_.dir.clones();
  if (std::ranges::find(there, name) == there.end()) {
    return fail(ErrorCode::usage, "{} has no clone \"{}\"", setup_.dir.path(), name);
  }
  if (std::ranges::find(clones_, name, &KeptClone::name) != clones_.end()) {
    return fail(ErrorCode::exists, "clone {} is served already", name);
  }
  const RestoreRecord record = VMSNAP_TRY(read_restore_record(setup_.dir.file(name)));
  if (!record.clone || record.phase < RestorePhase::registered || record.uffd < 0) {
    return fail(ErrorCode::damaged, "clone {} is not ready to be served", name);
  }
  if (record.image_id != setup_.record.image_id) {
    return fail(ErrorCode::damaged, "clone {} is of another image", name);
  }
  VMSNAP_CHECK(check_ranges(record, setup_.image.page_count()));
  KeptClone clone;
  clone.name = name;
  clone.ranges = record.ranges;
  for (const ServedRange& range : clone.ranges) {
    if (range.unit != page_size) return fail(ErrorCode::damaged, "clone {} has huge pages", name);
  }
  clone.process = VMSNAP_TRY(find_process(record));
  clone.uffd = VMSNAP_TRY(take_userfaultfd(clone.process, record.uffd));
  clones_.push_back(std::move(clone));
  if (!link_) return {};
  const Status told = link_.add(clones_.back());
  if (told) return {};
  // The next page server begins with all clones there are.
  log_warning("clone {}: {}", name, told.error().message());
  if (worker_ > 0) ::kill(worker_, SIGKILL);
  return {};
}

Status Keeper::start_worker() {
  auto [ours, theirs] = VMSNAP_TRY(message_pair());
  const pid_t child = ::fork();
  if (child < 0) return fail_errno(errno, "cannot start a page server");
  if (child == 0) {
    ours.reset();
    listener_.reset();
    connections_.clear();
    const PageWorkerSetup worker = {setup_.dir.path(), setup_.record, setup_.image, setup_.memory};
    ::_exit(run_page_worker(worker, std::move(clones_), theirs.get()));
  }
  worker_ = child;
  link_ = PageWorkerLink(std::move(ours));
  worker_started_ = Clock::now();
  return {};
}

void Keeper::see_after_worker() {
  int how = 0;
  if (::waitpid(worker_, &how, WNOHANG) != worker_) return;
  link_ = PageWorkerLink();
  worker_ = -1;
  unreadable_before_ = setup_.record.unreadable;
  log_warning("the page server {} {}; another one takes over",
              WIFSIGNALED(how) ? "was killed by signal" : "ended with status",
              WIFSIGNALED(how) ? WTERMSIG(how) : WEXITSTATUS(how));
  // Whatever kills it at once may go away; the clones wait for that.
  quick_deaths_ = ms_since(worker_started_) < 1000 ? quick_deaths_ + 1 : 0;
  if (quick_deaths_ > 5) ::sleep(1);
  ++restarts_;
  if (const Status started = start_worker(); !started) {
    log_line(LogLevel::error, started.error().message());
    ::sleep(1);
    worker_started_ = Clock::now();
  }
}

void Keeper::bury_the_dead() {
  const size_t before = clones_.size();
  for (auto clone = clones_.begin(); clone != clones_.end();) {
    if (clone->process.alive()) {
      ++clone;
      continue;
    }
    log_info("clone {} has ended", clone->name);
    if (auto dir = RunDir::open(setup_.dir.file(clone->name))) {
      if (auto record = dir->read()) {
        record->phase = RestorePhase::ended;
        (void)dir->write(*record);
      }
      dir->finish();
    }
    clone = clones_.erase(clone);
  }
  if (clones_.size() < before) note_unreadable();
}

// For who waits for the end of the clones.
void Keeper::note_unreadable() {
  if (!link_) return;
  const auto status = link_.status();
  if (!status) return;
  const uint64_t unreadable = unreadable_before_ + status->value("unreadable_pages", uint64_t{0});
  if (unreadable == setup_.record.unreadable) return;
  setup_.record.unreadable = unreadable;
  if (const Status written = setup_.dir.write(setup_.record); !written) {
    log_warning("{}", written.error().message());
  }
}

Result<LinkMessage> Keeper::answer(const nlohmann::json& request) {
  const std::string what = request.value("do", "");
  LinkMessage reply{nlohmann::json::object(), {}};
  if (what == "memory") {
    reply.descriptors.push_back(VMSNAP_TRY(setup_.memory.open_for_clone()));
  } else if (what == "hello") {
    reply.json["clones"] = nlohmann::json::array();
    for (const KeptClone& clone : clones_) reply.json["clones"].push_back(clone.name);
  } else if (what == "join") {
    VMSNAP_CHECK(take_up(VMSNAP_TRY(text_field(request, "clone"))));
  } else if (what == "status") {
    if (!link_) return fail(ErrorCode::vm, "there is no page server at the moment");
    reply.json = VMSNAP_TRY(link_.status());
    reply.json.erase("number");
    reply.json["restarts"] = restarts_;
    reply.json["server_pid"] = worker_;
  } else {
    return fail(ErrorCode::usage, "the farm does not know \"{}\"", what);
  }
  return reply;
}

// False: it has closed, or is no good.
bool Keeper::serve_connection(int socket) {
  const auto request = receive_message(socket, std::chrono::milliseconds(0));
  if (!request || !*request) return false;
  const auto reply = [&]() -> Result<LinkMessage> {
    const auto what = (*request)->json.find("do");
    if (what == (*request)->json.end() || !what->is_string()) {
      return fail(ErrorCode::usage, "what was asked for is no request");
    }
    return answer((*request)->json);
  }();
  if (!reply) return static_cast<bool>(send_message(socket, {{"error", reply.error().message()}}));
  std::vector<int> descriptors;
  for (const Fd& fd : reply->descriptors) descriptors.push_back(fd.get());
  return static_cast<bool>(send_message(socket, reply->json, descriptors));
}

Status Keeper::wait() {
  std::vector<pollfd> waits = {{listener_.get(), POLLIN, 0}, {link_.fd(), 0, 0}};
  for (const KeptClone& clone : clones_) waits.push_back({clone.process.pidfd(), POLLIN, 0});
  const size_t connections_at = waits.size();
  for (const Fd& connection : connections_) waits.push_back({connection.get(), POLLIN, 0});
  if (::poll(waits.data(), waits.size(), 1000) < 0 && errno != EINTR) {
    return fail_errno(errno, "cannot wait for requests");
  }
  for (size_t i = connections_.size(); i-- > 0;) {
    if (waits[connections_at + i].revents && !serve_connection(connections_[i].get())) {
      connections_.erase(connections_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  if (waits[0].revents) {
    Fd connection(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (connection) connections_.push_back(std::move(connection));
    // No descriptor is free: who waits makes the listener ready again at once.
    else ::usleep(100'000);
  }
  return {};
}

Status Keeper::run() {
  VMSNAP_CHECK(start_worker());
  while (!clones_.empty() || !connections_.empty()) {
    VMSNAP_CHECK(wait());
    see_after_worker();
    bury_the_dead();
  }
  log_info("the last clone has gone");
  ::unlink(setup_.dir.socket().c_str());
  link_ = PageWorkerLink();  // the page server ends
  return {};
}

}  // namespace

Result<Fd> start_keeper(FarmSetup setup, const std::vector<std::string>& clones) {
  Fd listener = VMSNAP_TRY(listen_for_messages(setup.dir.socket()));
  auto [ours, theirs] = VMSNAP_TRY(message_pair());
  std::optional<HeldSignals> held(std::in_place);
  const pid_t child = ::fork();
  if (child < 0) return fail_errno(errno, "cannot start a background process");
  if (child > 0) return std::move(ours);
  ours.reset();
  become_background(setup.dir.file("vmsnap.log"));
  held.reset();
  const MoreDescriptors two_for_each_clone;  // also in the page server, which comes from here
  setup.record.keeper_pid = ::getpid();
  Status done = setup.dir.write(setup.record);
  Keeper keeper(std::move(setup), std::move(listener), std::move(theirs));
  for (const std::string& name : clones) {
    const Status taken = keeper.take_up(name);
    if (!taken) log_warning("{}", taken.error().message());
  }
  if (done) done = keeper.run();
  if (!done) log_line(LogLevel::error, done.error().message());
  ::_exit(done ? 0 : 1);
}

}  // namespace vmsnap
