#include "snap/guard.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <thread>

#include "formats/json.h"
#include "formats/log.h"
#include "snap/vmm/caretaker.h"
#include "snap/vmm/descriptor_message.h"

namespace vmsnap {

namespace {

// Between two signs of life; each wakes the guard.
constexpr std::chrono::milliseconds longest_beat_gap{200};

// How long the guard tries to resume a VM that hangs; then it is for people to say
// whether it shall run.
constexpr std::chrono::hours resume_tries{1};
constexpr std::chrono::milliseconds between_tries{200};
// In which it looks whether we are dead and only cannot go.
constexpr int look_every_ms = 500;
// How long the guard waits for our death before it goes on: mostly that takes no time,
// and sometimes as long as a disk hangs.
constexpr std::chrono::seconds longest_death{1};
// How long we wait for a guard that has something to do yet.
constexpr std::chrono::seconds longest_farewell{12};

// Everything the guard's process needs, and all it keeps.
struct GuardProcess {
  Fd socket;
  Process parent;
  const Process* vm = nullptr;
  std::vector<RemoteRange> memory;
  int qmp_fd = -1;
  MonitorAddress monitor;
  std::optional<KsmPause>* ksm = nullptr;
  int limit_ms = 0;

  bool paused = false;
  bool watching = false;
  bool committing = false;
  std::optional<Uffd> uffd;

  void run();
  bool parent_is_dying() const;
  bool hear();
  void note(char what);
  void free_memory();
  void resume_vm();
  bool resume_by_our_socket();
};

void GuardProcess::note(char what) {
  switch (what) {
    case 'P': paused = true; break;
    case 'R':
      paused = false;
      // The monitor serves one client at a time: ours has done its work.
      if (qmp_fd >= 0) ::close(std::exchange(qmp_fd, -1));
      break;
    case 'W': watching = true; break;
    case 'U':
      watching = false;
      uffd.reset();
      break;
    case 'C': committing = true; break;
    default: break;  // a heartbeat
  }
}

void GuardProcess::run() {
  for (int silent_ms = 0;;) {
    pollfd waiting = {socket.get(), POLLIN, 0};
    const bool is_due = (paused && !committing) || watching;
    const int step_ms = std::min(limit_ms - silent_ms, look_every_ms);
    const int ready = ::poll(&waiting, 1, is_due ? step_ms : -1);
    if (ready < 0 && errno == EINTR) continue;
    silent_ms = ready == 0 ? silent_ms + step_ms : 0;
    if (ready == 0 && silent_ms < limit_ms && !parent_is_dying()) continue;
    if (ready == 0) {
      // No sign of life, and a guest that may be waiting for one. From here on nothing
      // of ours runs that could take memory that we free for what it was.
      parent.kill();
      free_memory();
      (void)parent.wait_for_end(longest_death);
      break;
    }
    if (!hear()) break;
  }
  free_memory();
  if (paused) resume_vm();
  if (ksm && *ksm) (*ksm)->end();
}

// Killed, and not yet gone, because a thread waits for a disk.
bool GuardProcess::parent_is_dying() const {
  const auto state = parent.status_field("State");
  return state && state->starts_with("Z");
}

// False: nobody is there any more.
bool GuardProcess::hear() {
  char what[256];
  std::vector<Fd> descriptors;
  const ssize_t got =
      receive_with_descriptors(socket.get(), std::as_writable_bytes(std::span(what)), 1, descriptors)
          .bytes;
  if (got <= 0) return false;
  if (!descriptors.empty()) uffd = Uffd::adopt(std::move(descriptors.front()));
  for (ssize_t i = 0; i < got; ++i) note(what[i]);
  return true;
}

void GuardProcess::free_memory() {
  if (!uffd) return;
  for (const RemoteRange& range : memory) (void)uffd->unregister_range(range);
  uffd.reset();
}

// Nobody listens at the monitor's socket: the VM has ended.
bool is_gone(const Error& error) {
  return error.os_errno() == ECONNREFUSED || error.os_errno() == ENOENT;
}

// On the socket we share with the dead: QEMU would not listen to another
// client while this one is open. Commands go out in one piece, so the dead
// left none half sent. False: the socket is gone, or QEMU refused.
bool GuardProcess::resume_by_our_socket() {
  static constexpr char command[] = "\n{\"execute\":\"cont\",\"id\":\"snapguard\"}\n";
  if (qmp_fd < 0 || ::send(qmp_fd, command, sizeof command - 1, MSG_NOSIGNAL) <= 0) return false;
  // Wait until QEMU has read it: closing a socket with unread data in our
  // direction is no harm, but the command must be taken first. Its answer,
  // or the end of the VM, tells.
  std::string seen;
  for (int tries = 0; tries < 100; ++tries) {
    pollfd answer = {qmp_fd, POLLIN, 0};
    if (::poll(&answer, 1, 100) <= 0) continue;
    char buffer[4096];
    const ssize_t got = ::recv(qmp_fd, buffer, sizeof buffer, 0);
    if (got <= 0) return false;
    seen.append(buffer, static_cast<size_t>(got));
    for (size_t end; (end = seen.find('\n')) != std::string::npos; seen.erase(0, end + 1)) {
      const auto line = parse_json(seen.substr(0, end));
      if (text_of(line, "id") == "snapguard") return line.contains("return");
    }
  }
  return false;
}

void GuardProcess::resume_vm() {
  if (resume_by_our_socket()) return;
  if (qmp_fd >= 0) ::close(std::exchange(qmp_fd, -1));
  // Whoever has the monitor at this moment may go, and take our connection along;
  // or QEMU itself hangs, in a `stop` that waits for a disk, and takes nobody: the
  // VM stands still until one gets through.
  const auto end = std::chrono::steady_clock::now() + resume_tries;
  do {
    if (!vm->alive()) return;
    auto qmp = Qmp::connect(monitor);
    // Or another VM has that path now.
    const bool is_it = qmp && qmp->is_behind_it(*vm).value_or(false);
    if (is_it && qmp->execute("cont")) return;
    if (!qmp && !monitor.is_libvirt() && is_gone(qmp.error())) return;
    std::this_thread::sleep_for(between_tries);
  } while (std::chrono::steady_clock::now() < end);
}

// No pipe or terminal of the caller stays open for our sake.
void let_go_of_standard_streams() {
  const Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  for (int standard = 0; standard <= 2; ++standard) ::dup2(null.get(), standard);
}

}  // namespace

Result<Guard> Guard::start(const GuardedVm& vm, std::optional<KsmPause>* ksm,
                           std::chrono::milliseconds stand_still_limit) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) {
    return fail_errno(errno, "cannot make a socket pair");
  }
  Fd theirs(ends[0]), ours(ends[1]);
  Process self = VMSNAP_TRY(Process::open(::getpid()));

  const pid_t pid = ::fork();
  if (pid < 0) return fail_errno(errno, "cannot fork");
  if (pid == 0) {
    ours.reset();
    become_caretaker("snapguard");
    GuardProcess guard;
    guard.socket = std::move(theirs);
    guard.parent = std::move(self);
    guard.vm = &vm.process;
    guard.memory = vm.memory;
    if (vm.qmp) {
      guard.qmp_fd = vm.qmp->fd();
      guard.monitor = vm.qmp->address();
    }
    guard.ksm = ksm;
    guard.limit_ms = static_cast<int>(stand_still_limit.count());
    let_go_of_standard_streams();
    guard.run();
    ::_exit(0);
  }
  return Guard(std::move(ours), pid,
               std::min<Clock::duration>(stand_still_limit / 20, longest_beat_gap));
}

Guard::~Guard() {
  if (pid_ == 0) return;
  socket_.reset();
  const Clock::time_point end = Clock::now() + longest_farewell;
  for (;;) {
    const pid_t ended = ::waitpid(pid_, nullptr, WNOHANG);
    if (ended > 0 || (ended < 0 && errno != EINTR)) return;
    if (Clock::now() >= end) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  log_warning("the VM does not answer; a guard (process {}) goes on trying to resume it, for an hour",
              pid_);
}

void Guard::heartbeat() {
  const Clock::time_point now = Clock::now();
  if (now - last_beat_.load(std::memory_order_relaxed) < beat_every_) return;
  last_beat_.store(now, std::memory_order_relaxed);
  tell('H');
}

void Guard::tell(char what) const {
  // A guard that is slow must not slow us: a full socket loses heartbeats only, the
  // others are few.
  (void)!::send(socket_.get(), &what, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
}

void Guard::watched(const Uffd& uffd) const {
  const std::byte no_more_than_a_heartbeat{'H'};
  const int descriptor = uffd.fd();
  (void)send_with_descriptors(socket_.get(), {&no_more_than_a_heartbeat, 1}, {&descriptor, 1},
                              MSG_DONTWAIT);
}

}  // namespace vmsnap
