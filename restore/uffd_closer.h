// Closing the userfaultfd that a VM holds, for a page server that has given up
// its privileges: to close a descriptor in another process takes ptrace(2).
#pragma once

#include <sys/types.h>

#include "formats/error.h"
#include "formats/file.h"
#include "restore/run_dir.h"

namespace vmsnap {

// A child process that waits for the word, and ends without having done
// anything when its parent has ended. It keeps no descriptor of the parent's
// (a run directory's lock would stay held) except where it logs to.
class UffdCloser {
 public:
  // Forks: must be called while the process has one thread.
  static Result<UffdCloser> start(const RestoreRecord& record);

  // Blocks until it is closed, some milliseconds. Once. What went wrong is in
  // the log.
  Status close();

 private:
  Fd word_;
  pid_t child_ = 0;
  pid_t vm_ = 0;
};

}  // namespace vmsnap
