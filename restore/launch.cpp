#include "restore/launch.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "formats/key_source.h"
#include "snap/vmm/caretaker.h"

namespace vmsnap {

namespace {

struct Pipe {
  Fd read, write;
};

Result<Pipe> make_pipe() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) < 0) return fail_errno(errno, "cannot make a pipe");
  return Pipe{Fd(ends[0]), Fd(ends[1])};
}

// Waits for one byte; false at the end of the pipe.
bool wait_for_byte(int fd) {
  char byte;
  ssize_t got;
  do {
    got = ::read(fd, &byte, 1);
  } while (got < 0 && errno == EINTR);
  return got == 1;
}

void reset_signals() {
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGXFSZ, SIGCHLD}) ::signal(number, SIG_DFL);
}

// The child's side: becomes the VMM, or reports errno and exits.
[[noreturn]] void become(const LaunchLine& line, int log, int null, int go, int report) {
  ::setsid();
  reset_signals();
  // Nobody guards us yet; if our parent dies now, so do we.
  if (!wait_for_byte(go)) ::_exit(127);
  std::vector<char*> arguments;
  for (const std::string& argument : line.arguments) {
    arguments.push_back(const_cast<char*>(argument.c_str()));
  }
  arguments.push_back(nullptr);
  std::vector<char*> environment = environment_without_keys();
  environment.push_back(nullptr);
  if (::dup2(null, 0) >= 0 && ::dup2(log, 1) >= 0 && ::dup2(log, 2) >= 0 &&
      ::chdir(line.working_directory.c_str()) == 0) {
    ::execve(line.executable.c_str(), arguments.data(), environment.data());
  }
  const int why = errno;
  [[maybe_unused]] const ssize_t put = ::write(report, &why, sizeof why);
  ::_exit(127);
}

[[noreturn]] void guard(int pidfd, int word) {
  become_caretaker("snapguard");
  // Not the lock of the run directory, nor anybody's output.
  const int pidfd_copy = ::fcntl(pidfd, F_DUPFD_CLOEXEC, 3);
  ::dup2(pidfd_copy, 0);
  ::dup2(word, 1);
  ::close_range(2, ~0U, 0);
  pollfd waits[2] = {{0, POLLIN, 0}, {1, POLLIN, 0}};
  while (::poll(waits, 2, -1) < 0 && errno == EINTR) {
  }
  const bool vm_ended = waits[0].revents != 0;
  if (!vm_ended && !wait_for_byte(1)) ::syscall(SYS_pidfd_send_signal, 0, SIGKILL, nullptr, 0);
  ::_exit(0);
}

Result<int> exec_error(int report) {
  int why = 0;
  ssize_t got;
  do {
    got = ::read(report, &why, sizeof why);
  } while (got < 0 && errno == EINTR);
  return got == sizeof why ? why : 0;
}

// The last lines of a log, on one line.
std::string log_tail(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const Fd log(fd);
  if (!log) return "";
  struct stat about = {};
  if (::fstat(fd, &about) < 0) return "";
  constexpr off_t wanted = 1000;
  std::string tail(static_cast<size_t>(std::min(about.st_size, wanted)), '\0');
  const ssize_t got =
      ::pread(fd, tail.data(), tail.size(), about.st_size - static_cast<off_t>(tail.size()));
  tail.resize(got > 0 ? static_cast<size_t>(got) : 0);
  while (!tail.empty() && tail.back() == '\n') tail.pop_back();
  std::replace(tail.begin(), tail.end(), '\n', '|');
  return tail;
}

}  // namespace

void kill_and_wait(const Process& process) {
  process.kill();
  (void)process.wait_for_end(std::chrono::seconds(5));
  ::waitpid(process.pid(), nullptr, WNOHANG);  // if it is our child
}

Result<StartedVm> StartedVm::start(const LaunchLine& line, const std::string& log_path) {
  const Fd log =
      VMSNAP_TRY(open_file(log_path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_NOFOLLOW));
  const Fd null = VMSNAP_TRY(open_file("/dev/null", O_RDWR));
  Pipe go = VMSNAP_TRY(make_pipe());
  Pipe report = VMSNAP_TRY(make_pipe());
  Pipe word = VMSNAP_TRY(make_pipe());

  const pid_t child = ::fork();
  if (child < 0) return fail_errno(errno, "cannot start {}", line.executable);
  if (child == 0) {
    go.write.reset();
    word.write.reset();
    become(line, log.get(), null.get(), go.read.get(), report.write.get());
  }
  report.write.reset();
  Process process = VMSNAP_TRY(Process::open(child));
  const pid_t guard_pid = ::fork();
  if (guard_pid < 0) return fail_errno(errno, "cannot start a guard process");
  if (guard_pid == 0) guard(process.pidfd(), word.read.get());

  StartedVm vm(std::move(process), std::move(word.write), guard_pid, log_path);
  VMSNAP_CHECK(write_all(go.write.get(), std::as_bytes(std::span("x", 1)), "a pipe"));
  const int why = VMSNAP_TRY(exec_error(report.read.get()));
  if (why == 0) return vm;
  return tl::unexpected(
      Error::from_errno(
          why,
          fmt::format("cannot execute {} in directory {}", line.executable, line.working_directory),
          ErrorCode::vm)
          .with_remedy("Install it, or name another with --qemu; the directory must exist."));
}

StartedVm::~StartedVm() {
  if (!guard_) return;
  kill_and_wait(process_);
  guard_.reset();
  ::waitpid(guard_pid_, nullptr, 0);
}

Status StartedVm::let_live() {
  const Status told =
      write_all(guard_.get(), std::as_bytes(std::span("x", 1)), "the guard's pipe");
  // The guard goes when the VM does.
  if (!told) return fail(ErrorCode::vm, "the restored VM ended while it was loaded");
  guard_.reset();
  ::waitpid(guard_pid_, nullptr, 0);
  return {};
}

Error StartedVm::explain(Error error) const {
  std::string text;
  ErrorCode code = error.code();
  int status = 0;
  // A VMM that is about to exit gets a moment to say why.
  if (process_.wait_for_end(std::chrono::milliseconds(200)) &&
      ::waitpid(process_.pid(), &status, WNOHANG) > 0) {
    text = WIFSIGNALED(status) ? fmt::format("it was killed by signal {}", WTERMSIG(status))
                               : fmt::format("it exited with status {}", WEXITSTATUS(status));
    // Whatever failed first, failed because the VM had gone.
    if (code == ErrorCode::io) code = ErrorCode::vm;
  }
  const std::string tail = log_tail(log_path_);
  if (!tail.empty()) text += fmt::format("{}it said: {}", text.empty() ? "" : "; ", tail);
  if (text.empty()) return error;
  return Error(code, fmt::format("{} ({})", error.message(), text))
      .with_remedy(error.remedy());
}

}  // namespace vmsnap
