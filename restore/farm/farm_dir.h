// The run directory of a farm, and what is written down there so that another
// page server can take over.
//
//   farm.json    which image the clones are of, and how they are served
//   farm.sock    the keeper's socket (farm_keeper.h)
//   lock         held by the keeper and its page server while one of them lives
//   vmsnap.log   what they had to say
//   N/           the run directory of clone number N (run_dir.h)
//
// What is read back is checked before it is believed.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "restore/run_dir.h"

namespace vmsnap {

struct FarmRecord {
  std::string image;  // absolute path
  std::string image_id;
  Prefetch prefetch = Prefetch::all;
  uint64_t memory = 0;  // limit of the shared pages, bytes; 0: none
  pid_t keeper_pid = 0;
  uint64_t unreadable = 0;  // pages that clones wanted and that could not be read back
};

class FarmDir {
 public:
  // Makes the directory (mode 0700) if it is not there; empty: a new one where
  // run directories are made. `made` says whether it was made. Not locked.
  static Result<FarmDir> make(const std::string& path, bool* made = nullptr);
  // ErrorCode::usage for a directory that is not a farm's.
  static Result<FarmDir> open(const std::string& path);

  const std::string& path() const { return path_; }
  std::string file(std::string_view name) const { return path_ + "/" + std::string(name); }
  std::string socket() const { return file("farm.sock"); }

  // ErrorCode::exists while a keeper is at work there, still after `patience`.
  Result<Fd> lock(std::chrono::milliseconds patience = {}) const {
    return lock_run_directory(path_, patience);
  }
  Status write(const FarmRecord& record) const;
  Result<FarmRecord> read() const;

  // Names of the clones' directories, ascending; and a new one's, made.
  std::vector<std::string> clones() const;
  Result<std::string> new_clone() const;

 private:
  std::string path_;
};

}  // namespace vmsnap
