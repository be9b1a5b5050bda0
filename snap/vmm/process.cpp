#include "snap/vmm/process.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>

namespace vmsnap {

namespace fs = std::filesystem;

namespace {

Result<std::string> read_link(const std::string& path) {
  std::error_code failed;
  const fs::path target = fs::read_symlink(path, failed);
  if (!failed) return target.string();
  Error error = Error::from_errno(failed.value(), fmt::format("cannot read {}", path));
  if (failed.value() != EACCES && failed.value() != EPERM) return tl::unexpected(std::move(error));
  return tl::unexpected(
      Error(ErrorCode::privilege, error.message()).with_remedy("Run vmsnap as root."));
}

// A field of a `stat` file of proc(5). The name in field 2 may hold spaces and
// parentheses; what follows its last ')' starts with field 3.
Result<uint64_t> read_stat_field(const std::string& path, int number) {
  const std::string stat = VMSNAP_TRY(read_small_file(path));
  size_t at = stat.rfind(')');
  for (int field = 2; field < number && at != std::string::npos; ++field) at = stat.find(' ', at + 1);
  uint64_t value = 0;
  if (at == std::string::npos ||
      std::from_chars(stat.data() + at + 1, stat.data() + stat.size(), value).ec != std::errc()) {
    return fail(ErrorCode::vm, "cannot read field {} of {}", number, path);
  }
  return value;
}

// The names of a /proc directory that are numbers.
Result<std::vector<int>> numbered_entries(const std::string& directory) {
  std::vector<int> numbers;
  std::error_code failed;
  for (fs::directory_iterator it(directory, failed), end; !failed && it != end;
       it.increment(failed)) {
    const std::string name = it->path().filename().string();
    int number = 0;
    const auto parsed = std::from_chars(name.data(), name.data() + name.size(), number);
    if (parsed.ec == std::errc() && parsed.ptr == name.data() + name.size()) {
      numbers.push_back(number);
    }
  }
  if (failed) return fail_errno(failed.value(), "cannot list {}", directory);
  return numbers;
}

}  // namespace

Result<Process> Process::open(pid_t pid) {
  Process process;
  process.pid_ = pid;
  const int fd = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
  if (fd < 0) {
    return tl::unexpected(
        Error::from_errno(errno, fmt::format("cannot open process {}", pid), ErrorCode::vm));
  }
  process.pidfd_ = Fd(fd);
  process.start_time_ = VMSNAP_TRY(read_stat_field(fmt::format("/proc/{}/stat", pid), 22));
  // The pidfd was there first: if the process lives now, the start time is its own.
  if (!process.alive()) return fail(ErrorCode::vm, "process {} has ended", pid);
  return process;
}

bool Process::wait_for_end(std::chrono::milliseconds limit) const {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + limit;
  pollfd exited = {pidfd_.get(), POLLIN, 0};
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    const int ready = ::poll(&exited, 1, static_cast<int>(std::max<int64_t>(left.count(), 0)));
    // A signal is not its end.
    if (ready >= 0 || errno != EINTR) return ready > 0;
  }
}

void Process::kill() const { ::syscall(SYS_pidfd_send_signal, pidfd_.get(), SIGKILL, nullptr, 0); }

Error Process::explain(Error error) const {
  // The memory of a dying process goes before the process does.
  const int why = error.os_errno();
  const bool looks_like_it = why == ESRCH || why == ENOENT || why == EPIPE || why == EFAULT ||
                             why == EIO || error.code() == ErrorCode::vm;
  if (!wait_for_end(std::chrono::milliseconds(looks_like_it ? 1000 : 0))) return error;
  if (error.code() == ErrorCode::interrupted || error.code() == ErrorCode::no_space) return error;
  return Error(ErrorCode::vm, fmt::format("process {} ended meanwhile ({})", pid_, error.message()))
      .with_remedy("Start the VM again, then try again.");
}

std::string Process::describe() const {
  auto name = read_small_file(fmt::format("/proc/{}/comm", pid_));
  if (!name) return fmt::format("process {}", pid_);
  while (!name->empty() && name->back() == '\n') name->pop_back();
  return fmt::format("{} (pid {})", *name, pid_);
}

Result<std::string> Process::executable() const {
  return read_link(fmt::format("/proc/{}/exe", pid_));
}

Result<std::vector<std::string>> Process::arguments() const {
  const std::string line = VMSNAP_TRY(read_small_file(fmt::format("/proc/{}/cmdline", pid_)));
  std::vector<std::string> arguments;
  for (size_t start = 0; start < line.size();) {
    const size_t end = std::min(line.find('\0', start), line.size());
    arguments.push_back(line.substr(start, end - start));
    start = end + 1;
  }
  return arguments;
}

Result<std::string> Process::working_directory() const {
  return read_link(fmt::format("/proc/{}/cwd", pid_));
}

Result<std::string> Process::status_field(std::string_view name) const {
  return thread_status_field(pid_, name);
}

Result<std::string> Process::thread_status_field(pid_t tid, std::string_view name) const {
  const std::string status =
      VMSNAP_TRY(read_small_file(fmt::format("/proc/{}/task/{}/status", pid_, tid)));
  const std::string key = fmt::format("\n{}:", name);
  const size_t at = status.find(key);
  if (at == std::string::npos) return std::string();
  const size_t start = status.find_first_not_of(" \t", at + key.size());
  return status.substr(start, status.find('\n', start) - start);
}

Result<int> Process::last_processor(pid_t tid) const {
  return static_cast<int>(VMSNAP_TRY(read_stat_field(fmt::format("/proc/{}/task/{}/stat", pid_, tid), 39)));
}

Result<std::vector<pid_t>> Process::threads() const {
  return numbered_entries(fmt::format("/proc/{}/task", pid_));
}

Result<std::vector<std::pair<int, std::string>>> Process::descriptors() const {
  const std::string directory = fmt::format("/proc/{}/fd", pid_);
  std::vector<std::pair<int, std::string>> found;
  for (const int number : VMSNAP_TRY(numbered_entries(directory))) {
    // One that was closed since the listing is no longer of interest.
    if (auto target = read_link(fmt::format("{}/{}", directory, number))) {
      found.emplace_back(number, *std::move(target));
    }
  }
  return found;
}

namespace {

template <class Call>
Status transfer(const Process& process, const char* verb, RemotePtr at, size_t length, Call call) {
  size_t done = 0;
  while (done < length) {
    const ssize_t moved = call(done);
    if (moved > 0) {
      done += static_cast<size_t>(moved);
      continue;
    }
    if (moved < 0 && errno == EINTR) continue;
    const int why = moved < 0 ? errno : EFAULT;
    return tl::unexpected(Error::from_errno(
        why,
        fmt::format("cannot {} memory of {} at {:#x}", verb, process.describe(), at.address() + done),
        ErrorCode::vm));
  }
  return {};
}

void* as_pointer(RemotePtr at) { return reinterpret_cast<void*>(at.address()); }

}  // namespace

Status Process::read(RemotePtr from, std::span<std::byte> to) const {
  return transfer(*this, "read", from, to.size(), [&](size_t done) {
    const iovec local = {to.data() + done, to.size() - done};
    const iovec remote = {as_pointer(from + done), to.size() - done};
    return ::process_vm_readv(pid_, &local, 1, &remote, 1, 0);
  });
}

Status Process::write(RemotePtr to, std::span<const std::byte> from) const {
  return transfer(*this, "write", to, from.size(), [&](size_t done) {
    const iovec local = {const_cast<std::byte*>(from.data()) + done, from.size() - done};
    const iovec remote = {as_pointer(to + done), from.size() - done};
    return ::process_vm_writev(pid_, &local, 1, &remote, 1, 0);
  });
}

Status Process::collapse(RemoteRange range) const {
  constexpr int madv_collapse = 25;  // newer than glibc 2.36
  const iovec where = {reinterpret_cast<void*>(range.start.address()), range.length};
  if (::syscall(SYS_process_madvise, pidfd_.get(), &where, 1, madv_collapse, 0) < 0) {
    return fail_errno(errno, "cannot make a huge page of {} at {:#x}", describe(), range.start.address());
  }
  return {};
}

Result<Fd> Process::take_descriptor(int remote_fd) const {
  const int fd = static_cast<int>(::syscall(SYS_pidfd_getfd, pidfd_.get(), remote_fd, 0));
  if (fd >= 0) return Fd(fd);
  const ErrorCode code = errno == EPERM ? ErrorCode::privilege : ErrorCode::vm;
  return tl::unexpected(
      Error::from_errno(errno, "cannot take a descriptor out of " + describe(), code)
          .with_remedy("Taking descriptors needs CAP_SYS_PTRACE: run vmsnap as root."));
}

}  // namespace vmsnap
