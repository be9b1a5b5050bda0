#include "snap/pause_command.h"

#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "formats/file.h"
#include "formats/key_source.h"

namespace vmsnap {

namespace {

tl::unexpected<Error> failed(const std::string& command, const std::string& how) {
  return tl::unexpected(
      Error(ErrorCode::pause_command, fmt::format("the --in-pause command '{}' {}", command, how))
          .with_remedy("The VM was resumed and no image was made. Mend the command, or give it "
                       "more time with --in-pause-limit."));
}

}  // namespace

Status run_pause_command(const std::string& command, const std::vector<std::string>& environment,
                         std::chrono::milliseconds limit) {
  std::vector<char*> variables = environment_without_keys();
  for (const std::string& entry : environment) variables.push_back(const_cast<char*>(entry.c_str()));
  variables.push_back(nullptr);

  posix_spawn_file_actions_t files;
  ::posix_spawn_file_actions_init(&files);
  ::posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", 0, 0);
  ::posix_spawn_file_actions_adddup2(&files, STDERR_FILENO, STDOUT_FILENO);
  posix_spawnattr_t attributes;
  ::posix_spawnattr_init(&attributes);
  // A group of its own, so that all it started can be ended with it; and the
  // ordinary way with signals.
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGDEF);
  sigset_t defaults;
  ::sigemptyset(&defaults);
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGXFSZ}) ::sigaddset(&defaults, number);
  ::posix_spawnattr_setsigdefault(&attributes, &defaults);

  char shell[] = "/bin/sh", dash_c[] = "-c";
  char* const arguments[] = {shell, dash_c, const_cast<char*>(command.c_str()), nullptr};
  pid_t pid = 0;
  const int spawned = ::posix_spawn(&pid, shell, &files, &attributes, arguments, variables.data());
  ::posix_spawnattr_destroy(&attributes);
  ::posix_spawn_file_actions_destroy(&files);
  if (spawned != 0) return failed(command, "could not be started");

  const Fd child(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  pollfd ended = {child.get(), POLLIN, 0};
  const auto deadline = std::chrono::steady_clock::now() + limit;
  int ready = 0;
  do {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    ready = ::poll(&ended, 1, std::max<int>(0, static_cast<int>(left.count())));
  } while (ready < 0 && errno == EINTR);

  if (ready == 0) ::kill(-pid, SIGKILL);
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (ready == 0) return failed(command, fmt::format("did not end within {} ms", limit.count()));
  if (WIFSIGNALED(status)) return failed(command, fmt::format("was ended by signal {}", WTERMSIG(status)));
  if (WEXITSTATUS(status) != 0) {
    return failed(command, fmt::format("exited with status {}", WEXITSTATUS(status)));
  }
  return {};
}

}  // namespace vmsnap
