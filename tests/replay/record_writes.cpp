// LD_PRELOAD library: writes down what a program does to files below
// RECORD_UNDER, in order, into the file RECORD_INTO. What could have survived a
// crash is made of that (tests/e2e/crash_replay.py).
//
// A record is a header of six 64-bit numbers (operation, inode, offset, length
// of data, of path, of second path), then path, second path, data. Inodes are
// numbered anew by each process.
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace {

enum Operation : uint64_t {
  create,  // at offset 1: opened, and there before
  write_data,
  sync_file,
  sync_folder,
  move,
  remove_file,
  make_folder,
  truncate_file,
};

std::recursive_mutex mutex;
int log_fd = -1;
std::string under;
std::map<std::pair<dev_t, ino_t>, uint64_t> inodes;

bool recording() {
  static const bool on = [] {
    const char* into = ::getenv("RECORD_INTO");
    const char* root = ::getenv("RECORD_UNDER");
    if (!into || !root) return false;
    under = root;
    log_fd = static_cast<int>(::syscall(SYS_openat, AT_FDCWD, into, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    return log_fd >= 0;
  }();
  return on;
}

bool ours(const char* path) {
  return path && recording() && ::strncmp(path, under.c_str(), under.size()) == 0;
}

void put(Operation operation, uint64_t inode, uint64_t offset, const void* data, size_t length,
         const std::string& path = {}, const std::string& second = {}) {
  const uint64_t header[] = {operation, inode, offset, length, path.size(), second.size()};
  std::string record(reinterpret_cast<const char*>(header), sizeof header);
  record += path;
  record += second;
  record.append(static_cast<const char*>(data), length);
  if (::syscall(SYS_write, log_fd, record.data(), record.size()) != static_cast<long>(record.size())) ::abort();
}

// 0 if the file is none of those below the folder.
uint64_t inode_of(int fd) {
  if (!recording()) return 0;
  struct stat status;
  if (::fstat(fd, &status) < 0) return 0;
  const auto found = inodes.find({status.st_dev, status.st_ino});
  return found == inodes.end() ? 0 : found->second;
}

template <class Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(::dlsym(RTLD_NEXT, name));
}

int opened(int fd, const char* path, int flags, bool was_there) {
  if (fd < 0 || !ours(path) || (flags & O_TMPFILE) == O_TMPFILE) return fd;
  const std::lock_guard lock(mutex);
  struct stat status;
  if (::fstat(fd, &status) < 0) return fd;
  const std::pair key(status.st_dev, status.st_ino);
  if (S_ISDIR(status.st_mode)) return fd;
  if (!was_there) {
    // An inode number that is used again is a new file. Those of different
    // processes are different.
    static uint64_t next = static_cast<uint64_t>(::getpid()) << 32;
    inodes[key] = ++next;
    put(create, inodes[key], 0, "", 0, path);
  } else if (!inodes.contains(key) && (flags & O_ACCMODE) != O_RDONLY) {
    // Made by an earlier process, and known by its path.
    static uint64_t next = static_cast<uint64_t>(::getpid()) << 32 | 1u << 31;
    inodes[key] = ++next;
    put(create, inodes[key], 1, "", 0, path);
  }
  return fd;
}

bool exists(const char* path) { return ::syscall(SYS_faccessat, AT_FDCWD, path, F_OK) == 0; }

}  // namespace

extern "C" {

int open(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const mode_t mode = va_arg(list, mode_t);
  va_end(list);
  const bool was_there = exists(path);
  return opened(static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, mode)), path, flags, was_there);
}

__attribute__((alias("open"))) int open64(const char* path, int flags, ...);

ssize_t pwrite(int fd, const void* data, size_t length, off_t offset) {
  const std::lock_guard lock(mutex);
  const ssize_t put_now = ::syscall(SYS_pwrite64, fd, data, length, offset);
  if (const uint64_t inode = inode_of(fd); inode && put_now > 0) {
    put(write_data, inode, static_cast<uint64_t>(offset), data, static_cast<size_t>(put_now));
  }
  return put_now;
}

ssize_t pwrite64(int fd, const void* data, size_t length, off_t offset) {
  return pwrite(fd, data, length, offset);
}

ssize_t write(int fd, const void* data, size_t length) {
  const std::lock_guard lock(mutex);
  const uint64_t inode = inode_of(fd);
  const off_t offset = inode ? ::lseek(fd, 0, SEEK_CUR) : 0;
  const ssize_t put_now = ::syscall(SYS_write, fd, data, length);
  if (inode && put_now > 0) {
    put(write_data, inode, static_cast<uint64_t>(offset), data, static_cast<size_t>(put_now));
  }
  return put_now;
}

int ftruncate(int fd, off_t length) {
  const std::lock_guard lock(mutex);
  const int done = static_cast<int>(::syscall(SYS_ftruncate, fd, length));
  if (const uint64_t inode = inode_of(fd); inode && done == 0) {
    put(truncate_file, inode, static_cast<uint64_t>(length), "", 0);
  }
  return done;
}

int fsync(int fd) {
  const std::lock_guard lock(mutex);
  if (!recording()) return static_cast<int>(::syscall(SYS_fsync, fd));
  char path[PATH_MAX] = {};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  struct stat status;
  if (::fstat(fd, &status) == 0 && S_ISDIR(status.st_mode)) {
    if (::readlink(link.c_str(), path, sizeof path - 1) > 0 && ours(path)) {
      put(sync_folder, 0, 0, "", 0, path);
    }
  } else if (const uint64_t inode = inode_of(fd)) {
    put(sync_file, inode, 0, "", 0);
  }
  return 0;  // the order is what counts here
}

int rename(const char* from, const char* to) {
  const std::lock_guard lock(mutex);
  const int done = static_cast<int>(::syscall(SYS_rename, from, to));
  if (done == 0 && ours(to)) put(move, 0, 0, "", 0, from, to);
  return done;
}

int renameat2(int from_at, const char* from, int to_at, const char* to, unsigned flags) {
  const std::lock_guard lock(mutex);
  const int done = static_cast<int>(::syscall(SYS_renameat2, from_at, from, to_at, to, flags));
  if (done == 0 && ours(to)) put(move, 0, 0, "", 0, from, to);
  return done;
}

int unlink(const char* path) {
  const std::lock_guard lock(mutex);
  const int done = static_cast<int>(::syscall(SYS_unlink, path));
  if (done == 0 && ours(path)) put(remove_file, 0, 0, "", 0, path);
  return done;
}

int mkdir(const char* path, mode_t mode) {
  const std::lock_guard lock(mutex);
  const int done = static_cast<int>(::syscall(SYS_mkdir, path, mode));
  if (done == 0 && ours(path)) put(make_folder, 0, 0, "", 0, path);
  return done;
}

}  // extern "C"
