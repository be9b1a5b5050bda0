// LD_PRELOAD library: a disk that is full, or broken, from one moment on.
//
// Counts what a program writes, syncs, renames and makes below FAIL_UNDER; from
// number FAIL_AT on (from 1) each of them fails with errno FAIL_WITH, and the
// file FAIL_NOTE is made. Removing files works.
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <string>

namespace {

bool below(const char* path) {
  static const char* root = ::getenv("FAIL_UNDER");
  return root && path && ::strncmp(path, root, ::strlen(root)) == 0;
}

bool below(int fd) {
  char path[PATH_MAX] = {};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  return ::syscall(SYS_readlink, link.c_str(), path, sizeof path - 1) > 0 && below(path);
}

// Whether this one fails; errno is set then.
bool fails() {
  static const long from = ::atol(::getenv("FAIL_AT") ?: "0");
  static std::atomic<long> count = 0;
  if (from <= 0 || ++count < from) return false;
  const char* note = ::getenv("FAIL_NOTE");
  const long fd = note ? ::syscall(SYS_openat, AT_FDCWD, note, O_CREAT | O_WRONLY | O_CLOEXEC, 0600) : -1;
  if (fd >= 0) ::syscall(SYS_close, fd);
  errno = ::atoi(::getenv("FAIL_WITH") ?: "28");
  return true;
}

}  // namespace

extern "C" {

int open(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const mode_t mode = va_arg(list, mode_t);
  va_end(list);
  const bool makes = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE;
  if (makes && below(path) && ::syscall(SYS_faccessat, AT_FDCWD, path, F_OK) != 0 && fails()) return -1;
  return static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}

__attribute__((alias("open"))) int open64(const char* path, int flags, ...);

ssize_t write(int fd, const void* data, size_t length) {
  if (below(fd) && fails()) return -1;
  return ::syscall(SYS_write, fd, data, length);
}

ssize_t pwrite(int fd, const void* data, size_t length, off_t offset) {
  if (below(fd) && fails()) return -1;
  return ::syscall(SYS_pwrite64, fd, data, length, offset);
}

__attribute__((alias("pwrite"))) ssize_t pwrite64(int fd, const void* data, size_t length, off_t offset);

int ftruncate(int fd, off_t length) {
  if (below(fd) && fails()) return -1;
  return static_cast<int>(::syscall(SYS_ftruncate, fd, length));
}

__attribute__((alias("ftruncate"))) int ftruncate64(int fd, off_t length);

int fsync(int fd) {
  if (below(fd) && fails()) return -1;
  return static_cast<int>(::syscall(SYS_fsync, fd));
}

int rename(const char* from, const char* to) {
  if (below(to) && fails()) return -1;
  return static_cast<int>(::syscall(SYS_rename, from, to));
}

int renameat2(int from_at, const char* from, int to_at, const char* to, unsigned flags) {
  if (below(to) && fails()) return -1;
  return static_cast<int>(::syscall(SYS_renameat2, from_at, from, to_at, to, flags));
}

int mkdir(const char* path, mode_t mode) {
  if (below(path) && fails()) return -1;
  return static_cast<int>(::syscall(SYS_mkdir, path, mode));
}

}  // extern "C"
