// A disk that fails: the test program's fsync(2) and readdir(3) go by here.
#pragma once

#include <sys/stat.h>

#include <mutex>
#include <set>
#include <string>
#include <utility>

namespace vmsnap {

// While it lives, and one at a time. Any thread may sync and list meanwhile.
class FaultyDisk {
 public:
  FaultyDisk();
  ~FaultyDisk();
  FaultyDisk(const FaultyDisk&) = delete;
  FaultyDisk& operator=(const FaultyDisk&) = delete;

  // From now on a sync of this directory fails with EIO.
  void fail_sync(const std::string& directory);
  // From now on a listing fails with EIO after so many names, . and .. among them.
  void fail_listing(const std::string& directory, int names);
  // Whether this file or directory was synced.
  bool was_synced(const std::string& path) const;

  // For the calls themselves: whether they may go on.
  bool may_sync(int fd);
  bool may_list(int fd);

 private:
  using File = std::pair<dev_t, ino_t>;

  mutable std::mutex mutex_;
  std::set<File> synced_;
  File cannot_sync_ = {}, cannot_list_ = {};
  int names_ = 0;
};

}  // namespace vmsnap
