#include "formats/store/store_lock.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <thread>

#include "formats/interrupt.h"

namespace vmsnap {

namespace {

// Bytes of the lock file that stand for something. Its first eight are the
// epoch; the others need not be there to be locked.
constexpr uint64_t commit_byte = 1024;
constexpr uint64_t maintain_byte = 1025;
constexpr uint64_t index_byte = 1026;
constexpr uint64_t verified_byte = 1027;
constexpr uint64_t first_epoch_byte = 4096;
constexpr uint64_t max_epoch = uint64_t{1} << 56;
constexpr std::chrono::milliseconds retry{10};
constexpr std::chrono::hours for_ever{24 * 365};

// Whether the lock was there to be had; an error if locks cannot be had at all.
Result<bool> try_lock(const Fd& fd, const StorePaths& paths, int type, uint64_t from,
                      uint64_t length) {
  struct flock lock = {};
  lock.l_type = static_cast<short>(type);
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(from);
  lock.l_len = static_cast<off_t>(length);
  if (::fcntl(fd.get(), F_OFD_SETLK, &lock) == 0) return true;
  if (errno == EAGAIN || errno == EACCES) return false;
  return fail_errno(errno, "cannot lock {}", paths.lock());
}

// Made anew if it was removed: nothing in it is worth more than the store. The
// first prune after that ends the epochs of the packs that wait still.
Result<Fd> open_lock_file(const StorePaths& paths, int access) {
  return open_file(paths.lock(), access | O_CREAT, 0600);
}

Result<uint64_t> read_epoch(const Fd& fd, const StorePaths& paths) {
  uint64_t epoch = 0;
  const ssize_t got = ::pread(fd.get(), &epoch, sizeof epoch, 0);
  if (got < 0) return fail_errno(errno, "cannot read {}", paths.lock());
  // Short: new, or the power went while the first epoch ended, and with it
  // everybody who was in one.
  if (got != sizeof epoch) return 0;
  if (epoch > max_epoch) {
    return tl::unexpected(Error(ErrorCode::damaged, paths.lock() + " is damaged")
                              .with_remedy("Remove it when nothing uses the store: it is made anew."));
  }
  return epoch;
}

}  // namespace

Result<StoreLock> StoreLock::use(const StorePaths& paths) {
  for (;;) {
    Fd fd = VMSNAP_TRY(open_lock_file(paths, O_RDONLY));
    const uint64_t epoch = VMSNAP_TRY(read_epoch(fd, paths));
    const bool locked = VMSNAP_TRY(try_lock(fd, paths, F_RDLCK, first_epoch_byte + epoch, 1));
    // Else an epoch ended in between, and may be looked at as unused already.
    if (locked && VMSNAP_TRY(read_epoch(fd, paths)) == epoch) return StoreLock(std::move(fd));
    VMSNAP_CHECK(check_interrupted());
  }
}

Result<StoreLock> StoreLock::exclusive(const StorePaths& paths, uint64_t byte,
                                       std::chrono::milliseconds wait, const char* what) {
  Fd fd = VMSNAP_TRY(open_lock_file(paths, O_RDWR));
  const auto deadline = std::chrono::steady_clock::now() + wait;
  while (!VMSNAP_TRY(try_lock(fd, paths, F_WRLCK, byte, 1))) {
    if (std::chrono::steady_clock::now() >= deadline) {
      return tl::unexpected(
          Error(ErrorCode::locked, fmt::format("{} is running in the store {}", what, paths.root))
              .with_remedy("Wait for it to end, or give --lock-wait."));
    }
    VMSNAP_CHECK(check_interrupted());
    std::this_thread::sleep_for(retry);
  }
  return StoreLock(std::move(fd));
}

Result<StoreLock> StoreLock::commit(const StorePaths& paths) {
  return exclusive(paths, commit_byte, for_ever, "another commit");
}

Result<StoreLock> StoreLock::maintain(const StorePaths& paths, std::chrono::milliseconds wait) {
  return exclusive(paths, maintain_byte, wait, "another prune, repair or change of keys");
}

Result<StoreLock> StoreLock::index(const StorePaths& paths) {
  return exclusive(paths, index_byte, for_ever, "another change of the index");
}

Result<StoreLock> StoreLock::verified(const StorePaths& paths) {
  return exclusive(paths, verified_byte, for_ever, "another note of what was verified");
}

Result<uint64_t> present_epoch(const StorePaths& paths) {
  const Fd fd = VMSNAP_TRY(open_file(paths.lock(), O_RDONLY));
  return read_epoch(fd, paths);
}

Status end_epoch(const StorePaths& paths, uint64_t epoch) {
  const Fd fd = VMSNAP_TRY(open_file(paths.lock(), O_RDWR));
  const uint64_t next = epoch + 1;
  return write_all_at(fd.get(), std::as_bytes(std::span(&next, 1)), 0, paths.lock());
}

Result<bool> epoch_in_use(const StorePaths& paths, uint64_t epoch) {
  const Fd fd = VMSNAP_TRY(open_file(paths.lock(), O_RDWR));
  return !VMSNAP_TRY(try_lock(fd, paths, F_WRLCK, first_epoch_byte, epoch + 1));
}

}  // namespace vmsnap
