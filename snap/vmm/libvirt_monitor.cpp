#include "snap/vmm/libvirt_monitor.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <filesystem>
#include <thread>
#include <vector>

#include "formats/key_source.h"
#include "snap/vmm/process.h"
#include "snap/vmm/qmp.h"

namespace vmsnap {

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr const char* program_name = "vmsnap-libvirt-monitor";
constexpr const char* probe_name = "vmsnap-probe";
// libvirt closes its own copy of the pipe when it has passed it on.
constexpr std::chrono::seconds longest_search{2};

// Beside vmsnap, where it was built; or where it was installed.
Result<std::string> find_program() {
  std::error_code failed;
  const fs::path self = fs::read_symlink("/proc/self/exe", failed);
  for (const fs::path& folder : {self.parent_path(), self.parent_path() / ".." / "libexec"}) {
    const fs::path program = folder / program_name;
    if (!failed && ::access(program.c_str(), X_OK) == 0) return program.string();
  }
  return tl::unexpected(
      Error(ErrorCode::refused, fmt::format("there is no {} beside {}", program_name, self.string()))
          .with_remedy("Build vmsnap where libvirt-dev is installed, or give the VM a second -qmp "
                       "socket and use --qmp."));
}

Status spawn(const std::string& program, const MonitorAddress& address, int socket) {
  posix_spawn_file_actions_t files;
  ::posix_spawn_file_actions_init(&files);
  ::posix_spawn_file_actions_adddup2(&files, socket, STDIN_FILENO);
  ::posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  ::posix_spawn_file_actions_addopen(&files, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  // What our caller left open, a passphrase among it, is not for it.
  ::posix_spawn_file_actions_addclosefrom_np(&files, STDERR_FILENO + 1);
  std::string words[] = {program, address.domain, address.uri};
  char* const arguments[] = {words[0].data(), words[1].data(), words[2].data(), nullptr};
  std::vector<char*> environment = environment_without_keys();
  environment.push_back(nullptr);
  pid_t pid = 0;
  const int why =
      ::posix_spawn(&pid, program.c_str(), &files, nullptr, arguments, environment.data());
  ::posix_spawn_file_actions_destroy(&files);
  if (why != 0) return fail_errno(why, "cannot start {}", program);
  // It forks at once, and its child is nobody's.
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (status != 0) return fail(ErrorCode::io, "cannot start {}: it ended with status {:#x}", program, status);
  return {};
}

bool holds(const Process& process, const std::string& link) {
  const auto descriptors = process.descriptors();
  return descriptors &&
         std::ranges::any_of(*descriptors, [&](const auto& each) { return each.second == link; });
}

// Processes but this one with that text for an argument.
std::vector<Process> processes_with(const std::string& argument) {
  std::vector<Process> found;
  std::error_code failed;
  for (fs::directory_iterator entry("/proc", failed), end; !failed && entry != end;
       entry.increment(failed)) {
    const std::string name = entry->path().filename();
    pid_t pid = 0;
    const auto parsed = std::from_chars(name.data(), name.data() + name.size(), pid);
    if (parsed.ec != std::errc() || parsed.ptr != name.data() + name.size()) continue;
    if (pid == ::getpid()) continue;
    auto process = Process::open(pid);
    if (!process) continue;
    const auto arguments = process->arguments();
    if (arguments && std::ranges::find(*arguments, argument) != arguments->end()) {
      found.push_back(*std::move(process));
    }
  }
  return found;
}

}  // namespace

Result<Fd> start_libvirt_monitor(const MonitorAddress& address) {
  const std::string program = VMSNAP_TRY(find_program());
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) {
    return fail_errno(errno, "cannot make a socket pair");
  }
  Fd ours(ends[0]);
  const Fd theirs(ends[1]);
  VMSNAP_CHECK(spawn(program, address, theirs.get()));
  return ours;
}

namespace {

// A pipe that QEMU has, too, for the time of `look`, which is given how /proc shows it.
template <class Look>
auto with_probe(Qmp& qmp, const Look& look) -> decltype(look(std::string())) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) < 0) return fail_errno(errno, "cannot make a pipe");
  const Fd reading(ends[0]), writing(ends[1]);
  struct stat about = {};
  if (::fstat(reading.get(), &about) < 0) return fail_errno(errno, "cannot look at a pipe");
  VMSNAP_TRY(qmp.execute("getfd", {{"fdname", probe_name}}, {reading.get()}));
  auto found = look(fmt::format("pipe:[{}]", about.st_ino));
  VMSNAP_TRY(qmp.execute("closefd", {{"fdname", probe_name}}));
  return found;
}

}  // namespace

Result<pid_t> find_process_behind(Qmp& qmp) {
  const std::string uuid = text_of(VMSNAP_TRY(qmp.execute("query-uuid")), "UUID");
  return with_probe(qmp, [&](const std::string& link) -> Result<pid_t> {
    std::vector<Process> holders;
    const auto end = Clock::now() + longest_search;
    do {
      holders = processes_with(uuid);
      std::erase_if(holders, [&](const Process& process) { return !holds(process, link); });
      if (holders.size() == 1) return holders.front().pid();
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    } while (Clock::now() < end);
    return tl::unexpected(
        Error(ErrorCode::vm, fmt::format("{}: {} processes here are this VM, with UUID {}",
                                         qmp.name(), holders.size(), uuid))
            .with_remedy("Run vmsnap as root on the VM's host, in its PID namespace."));
  });
}

Result<bool> is_behind(const Process& process, Qmp& qmp) {
  return with_probe(qmp, [&](const std::string& link) -> Result<bool> { return holds(process, link); });
}

}  // namespace vmsnap
