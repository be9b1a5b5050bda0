// Who may do what in a store at the same time.
//
// Kernel locks (open file description locks, fcntl(2)) on single bytes of the
// store's lock file: they vanish with their holder, however it ends, and are
// never stale. Snapshots, restores and readers never wait for anything but a
// commit, which is some renames.
//
// How packs can be deleted under readers and writers that run: every user of a
// store holds a shared lock on the byte of the epoch in which it began. Prune
// takes a dead pack out of sight (rename), then ends the epoch, and deletes
// the pack only when nobody holds that epoch or an earlier one. A writer that
// used such a pack puts it back when it commits.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "formats/error.h"
#include "formats/file.h"
#include "formats/store/store_paths.h"

namespace vmsnap {

// Held until destroyed. Each has a descriptor of its own. For one thread.
class StoreLock {
 public:
  // The shared lock of a user, in the present epoch. Needs only to read the
  // lock file; all of these make it if it is not there. Does not wait.
  static Result<StoreLock> use(const StorePaths& paths);

  // One at a time: putting packs and manifests under their names, taking them
  // away. Waits, as long as nobody interrupts us.
  static Result<StoreLock> commit(const StorePaths& paths);

  // One at a time: prune, repair, change of keys. Waits up to `wait`, then
  // ErrorCode::locked.
  static Result<StoreLock> maintain(const StorePaths& paths, std::chrono::milliseconds wait);

  // One at a time: changing an index. Waits.
  static Result<StoreLock> index(const StorePaths& paths);

  // One at a time: changing the note of when packs were verified. Waits.
  static Result<StoreLock> verified(const StorePaths& paths);

 private:
  explicit StoreLock(Fd fd) : fd_(std::move(fd)) {}
  static Result<StoreLock> exclusive(const StorePaths& paths, uint64_t byte,
                                     std::chrono::milliseconds wait, const char* what);

  Fd fd_;
};

// With the commit lock held: the present epoch, and its end.
Result<uint64_t> present_epoch(const StorePaths& paths);
Status end_epoch(const StorePaths& paths, uint64_t epoch);

// Whether a user that began in `epoch` or before may still be there.
Result<bool> epoch_in_use(const StorePaths& paths, uint64_t epoch);

}  // namespace vmsnap
