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

#include "formats/log.h"
#include "snap/vmm/caretaker.h"
#include "snap/vmm/process.h"

namespace vmsnap {

namespace {

// Between two signs of life; each wakes the guard.
constexpr std::chrono::milliseconds longest_beat_gap{50};

// How long the guard tries to resume a VM that hangs; then it is for people to say
// whether it shall run.
constexpr std::chrono::hours resume_tries{1};
// How long we wait for a guard that has something to do yet.
constexpr std::chrono::seconds longest_farewell{12};

// Everything the guard's process needs, and all it keeps.
struct GuardProcess {
  Fd pipe;
  Process parent;
  int qmp_fd = -1;
  std::string qmp_path;
  std::optional<KsmPause>* ksm = nullptr;
  int limit_ms = 0;

  bool paused = false;
  bool watching = false;

  void run();
  void note(char what);
  void resume_vm();
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
    case 'U': watching = false; break;
    default: break;  // a heartbeat
  }
}

void GuardProcess::run() {
  for (;;) {
    pollfd waiting = {pipe.get(), POLLIN, 0};
    const int ready = ::poll(&waiting, 1, paused || watching ? limit_ms : -1);
    if (ready < 0 && errno == EINTR) continue;
    if (ready == 0) {
      // No sign of life, and a guest that may be waiting for one.
      parent.kill();
      (void)parent.wait_for_end(std::chrono::milliseconds(limit_ms));
      break;
    }
    char what[256];
    const ssize_t got = ::read(pipe.get(), what, sizeof what);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    for (ssize_t i = 0; i < got; ++i) note(what[i]);
  }
  if (paused) resume_vm();
  if (ksm && *ksm) (*ksm)->end();
}

// Nobody listens at the monitor's socket: the VM has ended.
bool is_gone(const Error& error) {
  return error.os_errno() == ECONNREFUSED || error.os_errno() == ENOENT;
}

// On the socket we share with the dead: QEMU would not listen to another
// client while this one is open. Commands go out in one piece, so the dead
// left none half sent. If the socket is gone, by a connection of our own.
void GuardProcess::resume_vm() {
  static constexpr char command[] = "\n{\"execute\":\"cont\",\"id\":\"snapguard\"}\n";
  if (qmp_fd >= 0 && ::send(qmp_fd, command, sizeof command - 1, MSG_NOSIGNAL) > 0) {
    // Wait until QEMU has read it: closing a socket with unread data in our
    // direction is no harm, but the command must be taken first. Its answer,
    // or the end of the VM, tells.
    std::string seen;
    for (int tries = 0; tries < 100; ++tries) {
      pollfd answer = {qmp_fd, POLLIN, 0};
      if (::poll(&answer, 1, 100) <= 0) continue;
      char buffer[4096];
      const ssize_t got = ::recv(qmp_fd, buffer, sizeof buffer, 0);
      if (got <= 0) break;
      seen.append(buffer, static_cast<size_t>(got));
      if (seen.find("\"snapguard\"") != std::string::npos) return;
    }
  }
  if (qmp_fd >= 0) ::close(std::exchange(qmp_fd, -1));
  // Whoever has the monitor at this moment may go, and take our connection along;
  // or QEMU itself hangs, in a `stop` that waits for a disk, and takes nobody: the
  // VM stands still until one gets through.
  const auto end = std::chrono::steady_clock::now() + resume_tries;
  do {
    auto qmp = Qmp::connect(qmp_path);
    if (qmp && qmp->execute("cont")) return;
    if (!qmp && is_gone(qmp.error())) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  } while (std::chrono::steady_clock::now() < end);
}

// No pipe or terminal of the caller stays open for our sake.
void let_go_of_standard_streams() {
  const Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  for (int standard = 0; standard <= 2; ++standard) ::dup2(null.get(), standard);
}

}  // namespace

Result<Guard> Guard::start(const Qmp* qmp, std::optional<KsmPause>* ksm,
                           std::chrono::milliseconds stand_still_limit) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) < 0) return fail_errno(errno, "cannot make a pipe");
  Fd reading(ends[0]), writing(ends[1]);
  // Only our end must not block: a guard that is slow must not slow us.
  ::fcntl(writing.get(), F_SETFL, O_NONBLOCK);
  Process self = VMSNAP_TRY(Process::open(::getpid()));

  const pid_t pid = ::fork();
  if (pid < 0) return fail_errno(errno, "cannot fork");
  if (pid == 0) {
    writing.reset();
    become_caretaker("snapguard");
    GuardProcess guard;
    guard.pipe = std::move(reading);
    guard.parent = std::move(self);
    if (qmp) {
      guard.qmp_fd = qmp->fd();
      guard.qmp_path = qmp->socket_path();
    }
    guard.ksm = ksm;
    guard.limit_ms = static_cast<int>(stand_still_limit.count());
    let_go_of_standard_streams();
    guard.run();
    ::_exit(0);
  }
  return Guard(std::move(writing), pid,
               std::min<Clock::duration>(stand_still_limit / 20, longest_beat_gap));
}

Guard::~Guard() {
  if (pid_ == 0) return;
  pipe_.reset();
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
  // A full pipe loses heartbeats only: the others are few.
  (void)!::write(pipe_.get(), &what, 1);
}

}  // namespace vmsnap
