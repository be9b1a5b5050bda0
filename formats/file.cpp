#include "formats/file.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "formats/test_point.h"

namespace vmsnap {

namespace fs = std::filesystem;

Fd& Fd::operator=(Fd&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = other.release();
  }
  return *this;
}

int Fd::release() { return std::exchange(fd_, -1); }

void Fd::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

Result<Fd> open_file(const std::string& path, int flags, mode_t mode) {
  const int fd = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  if (fd < 0) return fail_errno(errno, "cannot open {}", path);
  return Fd(fd);
}

Status read_exact_at(int fd, std::span<std::byte> bytes, uint64_t offset, const std::string& name) {
  while (!bytes.empty()) {
    const ssize_t got = ::pread(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail_errno(errno, "cannot read {} at byte {}", name, offset);
    if (got == 0)
      return fail(ErrorCode::damaged, "{} ends at byte {}: it is cut short", name, offset);
    bytes = bytes.subspan(static_cast<size_t>(got));
    offset += static_cast<uint64_t>(got);
  }
  return {};
}

Status write_all_at(int fd, std::span<const std::byte> bytes, uint64_t offset,
                    const std::string& name) {
  // A kernel that is not preemptible gives the processor to nobody else, a guest
  // say, until a call is done: 400 KiB can take it a millisecond.
  constexpr size_t at_once = 64 << 10;
  while (!bytes.empty()) {
    const ssize_t put =
        ::pwrite(fd, bytes.data(), std::min(bytes.size(), at_once), static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return fail_errno(errno, "cannot write {}", name);
    if (put == 0) return fail_errno(EIO, "cannot write {}", name);
    bytes = bytes.subspan(static_cast<size_t>(put));
    offset += static_cast<uint64_t>(put);
  }
  return {};
}

Status set_nonblocking(int fd, bool on, const std::string& name) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags >= 0 && ::fcntl(fd, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK) == 0) return {};
  return fail_errno(errno, "cannot make {} {}blocking", name, on ? "non-" : "");
}

Result<bool> lock_whole_file(int fd, const std::string& name, FileLock kind) {
  struct flock lock = {};
  lock.l_type = kind == FileLock::shared ? F_RDLCK : F_WRLCK;
  lock.l_whence = SEEK_SET;
  if (::fcntl(fd, F_OFD_SETLK, &lock) == 0) return true;
  if (errno == EAGAIN || errno == EACCES) return false;
  return fail_errno(errno, "cannot lock {}", name);
}

void unlock_whole_file(int fd) {
  struct flock lock = {};
  lock.l_type = F_UNLCK;
  lock.l_whence = SEEK_SET;
  ::fcntl(fd, F_OFD_SETLK, &lock);
}

Status write_all(int fd, std::span<const std::byte> bytes, const std::string& name) {
  while (!bytes.empty()) {
    const ssize_t put = ::write(fd, bytes.data(), bytes.size());
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) return fail_errno(put < 0 ? errno : EIO, "cannot write {}", name);
    bytes = bytes.subspan(static_cast<size_t>(put));
  }
  return {};
}

namespace {

Result<std::string> read_all(int fd, const std::string& path, size_t limit) {
  std::string contents;
  char buffer[65536];
  for (;;) {
    const ssize_t got = ::read(fd, buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail_errno(errno, "cannot read {}", path);
    if (got == 0) return contents;
    contents.append(buffer, static_cast<size_t>(got));
    if (contents.size() > limit) {
      return fail(ErrorCode::damaged, "{} is larger than {} bytes", path, limit);
    }
  }
}

}  // namespace

Result<std::string> read_small_file(const std::string& path, size_t limit) {
  const Fd fd = VMSNAP_TRY(open_file(path, O_RDONLY));
  return read_all(fd.get(), path, limit);
}

Result<std::string> read_own_file(const std::string& path, size_t limit) {
  const Fd fd = VMSNAP_TRY(open_file(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK));
  struct stat found;
  if (::fstat(fd.get(), &found) < 0) return fail_errno(errno, "cannot look at {}", path);
  const bool ours = found.st_uid == ::geteuid() || found.st_uid == 0;
  if (ours && S_ISREG(found.st_mode) && (found.st_mode & (S_IWGRP | S_IWOTH)) == 0) {
    return read_all(fd.get(), path, limit);
  }
  return tl::unexpected(
      Error(ErrorCode::refused, fmt::format("{} is another user's (number {}), or others may write to it",
                                            path, found.st_uid))
          .with_remedy("What it says would be done: run vmsnap as that user."));
}

Status write_small_file(const std::string& path, std::string_view contents, mode_t mode) {
  AtomicFile file = VMSNAP_TRY(AtomicFile::create(path, /*replace=*/true));
  VMSNAP_CHECK(write_all(file.fd(), std::as_bytes(std::span(contents)), path));
  if (::fchmod(file.fd(), mode) < 0) return fail_errno(errno, "cannot set the mode of {}", path);
  return file.commit();
}

namespace {

constexpr size_t random_digits = 16;

std::string directory_of(const std::string& path) {
  const std::string directory = fs::path(path).parent_path().string();
  return directory.empty() ? "." : directory;
}

// ".NAME.vmsnap-": what every temporary file for `path` starts with.
std::string temporary_prefix(const std::string& path) {
  return "." + fs::path(path).filename().string() + ".vmsnap-";
}

// Whether `name` is one that create() makes for a file called `of`, or for any
// file if that is empty, and not a file of the user's.
bool is_temporary_name(const std::string& name, const std::string& of) {
  constexpr std::string_view mark = ".vmsnap-";
  if (name.size() <= mark.size() + random_digits || name.front() != '.') return false;
  const size_t mark_at = name.size() - random_digits - mark.size();
  return name.compare(mark_at, mark.size(), mark) == 0 &&
         name.find_first_not_of("0123456789abcdef", mark_at + mark.size()) == std::string::npos &&
         (of.empty() || name.compare(1, mark_at - 1, of) == 0);
}

// A file whose lock can be had has no living writer; one that cannot be looked
// at is left alone.
void remove_abandoned(const std::string& directory, const std::string& of) {
  std::error_code error;
  fs::directory_iterator entry(directory, error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const fs::path& found = entry->path();
    if (!is_temporary_name(found.filename().string(), of)) continue;
    const Fd fd(::open(found.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
    if (fd && lock_whole_file(fd.get(), found).value_or(false)) ::unlink(found.c_str());
  }
}

// Between its open() and its lock, another writer may take the new file for
// an abandoned one, and remove it.
bool is_linked(int fd) {
  struct stat status;
  return ::fstat(fd, &status) == 0 && status.st_nlink > 0;
}

tl::unexpected<Error> exists_already(const std::string& path) {
  return tl::unexpected(Error(ErrorCode::exists, path + " exists already")
                            .with_remedy("Choose another name, or give --force to replace it."));
}

// Nothing is at `path`, or a file that may be replaced. A device or a pipe is
// never replaced by a file: whoever names one wants to write into it.
Status check_target(const std::string& path, bool replace) {
  struct stat status;
  if (::lstat(path.c_str(), &status) < 0) return {};
  if (!replace) return exists_already(path);
  if (S_ISREG(status.st_mode) || S_ISLNK(status.st_mode)) return {};
  return tl::unexpected(Error(ErrorCode::exists, path + " exists already and is not a regular file")
                            .with_remedy("Choose another name."));
}

}  // namespace

Status sync_directory_of(const std::string& path) {
  const std::string directory = directory_of(path);
  const Fd fd = VMSNAP_TRY(open_file(directory, O_RDONLY | O_DIRECTORY));
  if (::fsync(fd.get()) < 0) return fail_errno(errno, "cannot sync directory {}", directory);
  return {};
}

void remove_abandoned(const std::string& directory) { remove_abandoned(directory, {}); }

Result<AtomicFile> AtomicFile::create(const std::string& path, bool replace) {
  VMSNAP_CHECK(check_target(path, replace));
  remove_abandoned(directory_of(path), fs::path(path).filename().string());
  return create_in(directory_of(path), path, replace);
}

Result<AtomicFile> AtomicFile::create_in(const std::string& directory, const std::string& path,
                                         bool replace) {
  AtomicFile file;
  file.path_ = path;
  file.replace_ = replace;
  for (;;) {
    uint64_t random = 0;
    if (::getrandom(&random, sizeof random, 0) != sizeof random) {
      return fail_errno(errno, "cannot get random bytes");
    }
    const std::string temporary = fmt::format("{}/{}{:0{}x}", directory, temporary_prefix(path),
                                              random, random_digits);
    file.fd_ = VMSNAP_TRY(open_file(temporary, O_RDWR | O_CREAT | O_EXCL));
    file.temporary_path_ = temporary;
    const bool locked = VMSNAP_TRY(lock_whole_file(file.fd_.get(), temporary));
    if (locked && is_linked(file.fd_.get())) return file;
    file.discard();
  }
}

AtomicFile& AtomicFile::operator=(AtomicFile&& other) noexcept {
  if (this != &other) {
    discard();
    fd_ = std::move(other.fd_);
    path_ = std::move(other.path_);
    temporary_path_ = std::exchange(other.temporary_path_, {});
    replace_ = other.replace_;
  }
  return *this;
}

Status AtomicFile::sync() {
  if (::fsync(fd_.get()) < 0) return fail_errno(errno, "cannot sync {}", path_);
  return {};
}

Status rename_to_new(const std::string& from, const std::string& to) {
  int renamed = ::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE);
  if (renamed < 0 && errno == EINVAL) {
    // A file system without RENAME_NOREPLACE: link(2) never replaces either.
    renamed = ::link(from.c_str(), to.c_str());
    if (renamed == 0) ::unlink(from.c_str());
  }
  if (renamed < 0) return fail_errno(errno, "cannot rename {} to {}", from, to);
  return {};
}

Status AtomicFile::publish() {
  if (!replace_) {
    const Status renamed = rename_to_new(temporary_path_, path_);
    if (!renamed && renamed.error().os_errno() == EEXIST) return exists_already(path_);
    VMSNAP_CHECK(renamed);
  } else if (::rename(temporary_path_.c_str(), path_.c_str()) < 0) {
    return fail_errno(errno, "cannot rename {} to {}", temporary_path_, path_);
  }
  // It said that the writer of a hidden file lives. Now it would keep out those
  // who lock what they read.
  unlock_whole_file(fd_.get());
  temporary_path_.clear();
  return {};
}

Status AtomicFile::commit() {
  VMSNAP_CHECK(sync());
  VMSNAP_TEST_POINT("commit.synced");
  VMSNAP_CHECK(publish());
  VMSNAP_TEST_POINT("commit.renamed");
  return sync_directory_of(path_);
}

void AtomicFile::discard() {
  if (!temporary_path_.empty()) ::unlink(temporary_path_.c_str());
  temporary_path_.clear();
  fd_.reset();
}

}  // namespace vmsnap
