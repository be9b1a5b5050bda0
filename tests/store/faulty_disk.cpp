#include "tests/store/faulty_disk.h"

#include <dirent.h>
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

namespace vmsnap {

namespace {

std::atomic<FaultyDisk*> present = nullptr;

std::pair<dev_t, ino_t> file_of(const struct stat& status) { return {status.st_dev, status.st_ino}; }

std::pair<dev_t, ino_t> file_of(int fd) {
  struct stat status = {};
  ::fstat(fd, &status);
  return file_of(status);
}

std::pair<dev_t, ino_t> file_of(const std::string& path) {
  struct stat status = {};
  ::stat(path.c_str(), &status);
  return file_of(status);
}

}  // namespace

FaultyDisk::FaultyDisk() { present = this; }
FaultyDisk::~FaultyDisk() { present = nullptr; }

void FaultyDisk::fail_sync(const std::string& directory) {
  const std::lock_guard lock(mutex_);
  cannot_sync_ = file_of(directory);
}

void FaultyDisk::fail_listing(const std::string& directory, int names) {
  const std::lock_guard lock(mutex_);
  cannot_list_ = file_of(directory);
  names_ = names;
}

bool FaultyDisk::was_synced(const std::string& path) const {
  const std::lock_guard lock(mutex_);
  return synced_.contains(file_of(path));
}

bool FaultyDisk::may_sync(int fd) {
  const std::lock_guard lock(mutex_);
  if (file_of(fd) == cannot_sync_) return false;
  synced_.insert(file_of(fd));
  return true;
}

bool FaultyDisk::may_list(int fd) {
  const std::lock_guard lock(mutex_);
  return file_of(fd) != cannot_list_ || names_-- > 0;
}

}  // namespace vmsnap

extern "C" int fsync(int fd) {
  vmsnap::FaultyDisk* const disk = vmsnap::present;
  if (!disk || disk->may_sync(fd)) return static_cast<int>(::syscall(SYS_fsync, fd));
  errno = EIO;
  return -1;
}

extern "C" dirent* readdir(DIR* directory) {
  static const auto real = reinterpret_cast<dirent* (*)(DIR*)>(::dlsym(RTLD_NEXT, "readdir"));
  vmsnap::FaultyDisk* const disk = vmsnap::present;
  if (!disk || disk->may_list(::dirfd(directory))) return real(directory);
  errno = EIO;
  return nullptr;
}
