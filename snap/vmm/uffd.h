// A userfaultfd(2) on another process's memory.
//
// Outcomes that a caller must handle are values of enums; errno gets its
// meaning here and nowhere else. All calls are safe from several threads at
// once. ErrorCode::vm when the process is gone (ESRCH).
//
// Sources: userfaultfd(2), ioctl_userfaultfd(2), and for features newer than
// Debian 12's header, include/uapi/linux/userfaultfd.h of Linux 6.18.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "snap/vmm/remote_ptr.h"

namespace vmsnap {

// What an event of the kernel says.
struct UffdEvent {
  enum class Kind { missing, write_protect, removed, unmapped, forked, moved, other };
  Kind kind = Kind::other;
  RemotePtr address;    // faults: the page (unaligned low bits cleared); removed: start
  uint64_t length = 0;  // removed and unmapped: bytes
  bool write = false;   // faults: the access was a write
  pid_t thread = 0;     // faults: whose, in its own PID namespace; 0: not told (thread_id)
};

enum class CopyOutcome {
  copied,
  already_there,   // EEXIST: a page is mapped there; nobody was woken
  try_again,       // EAGAIN: an event is unread or the map is changing; nothing copied
  no_mapping,      // ENOENT: the range is not mapped and registered any more
  no_memory,       // ENOMEM
  cannot_protect,  // EINVAL of a write-protected copy: not registered for that
};

enum class ProtectOutcome { done, try_again, no_mapping };

enum class RegisterOutcome {
  done,
  busy,         // EBUSY: another userfaultfd holds it
  unsupported,  // EINVAL: this kind of memory cannot be watched in this mode
};

enum class CopyMode {
  writable,
  write_protected,  // the page has the mark when it appears
};

struct RegisterMode {
  bool missing = false;
  bool write_protect = false;
};

class Uffd {
 public:
  Uffd() = default;
  // Takes a raw userfaultfd descriptor, not yet spoken to. UFFDIO_API with the
  // wanted features, which must all be there: ErrorCode::unsupported names
  // what is missing.
  static Result<Uffd> initialize(Fd fd, uint64_t features);
  // Takes one that somebody has initialized (a handshake, a dead predecessor).
  static Uffd adopt(Fd fd) { return Uffd(std::move(fd)); }

  // Features this kernel offers, by asking a userfaultfd of our own.
  static Result<uint64_t> kernel_features();

  // Whoever polls needs it: poll(2) on a blocking userfaultfd only ever says
  // POLLERR. Both of all descriptors that were duplicated from this one.
  Status make_nonblocking() const;
  Status make_blocking() const;

  int fd() const { return fd_.get(); }
  explicit operator bool() const { return static_cast<bool>(fd_); }
  // Drops all marks and wakes every waiter, if ours is the last descriptor.
  // Takes 20 ms per GiB that is still write-protected in 4 KiB pages.
  void close() { fd_.reset(); }

  Result<RegisterOutcome> register_range(RemoteRange range, RegisterMode mode) const;
  // Whoever waits in it goes on.
  Status unregister_range(RemoteRange range) const;

  // Sets or clears the write protection of whole pages; clearing wakes waiters.
  Result<ProtectOutcome> write_protect(RemoteRange range) const;
  Result<ProtectOutcome> unprotect(RemoteRange range) const;

  // Up to `limit` events, without waiting: empty when none is there. The
  // descriptor must be O_NONBLOCK. (Since Linux 6.9 it does not wait either
  // when another process that has the descriptor takes O_NONBLOCK away.)
  Result<std::vector<UffdEvent>> read_events(size_t limit = 64) const;

  // Waits for one event, in read(2) itself; none if a signal came instead. The
  // descriptor must be a blocking one.
  Result<std::optional<UffdEvent>> wait_for_event() const;

  // The same in two steps, for who must not lose an event that was read when
  // it is killed: the kernel writes the messages into `buffer` (a multiple of
  // message_bytes long) before read(2) returns, and whoever has the buffer can
  // tell what they said. Zeroed messages are events of the kind `other`.
  static constexpr size_t message_bytes = 32;
  Result<std::span<const std::byte>> read_messages(std::span<std::byte> buffer) const;
  static std::vector<UffdEvent> parse_messages(std::span<const std::byte> messages);

  // Fills absent pages atomically and wakes who waits. `copied_bytes`: how far
  // it got (also when the outcome is not `copied`).
  struct Copied {
    CopyOutcome outcome = CopyOutcome::copied;
    uint64_t bytes = 0;
  };
  Result<Copied> copy(RemotePtr to, std::span<const std::byte> pages,
                      CopyMode mode = CopyMode::writable) const;
  Result<Copied> zero(RemoteRange range, bool wake = true) const;

  // Makes every later access a SIGBUS (UFFDIO_POISON, Linux 6.6).
  Result<Copied> poison(RemoteRange range) const;

  // Wakes who waits in the range; they fault again if nothing changed.
  Status wake(RemoteRange range) const;

 private:
  explicit Uffd(Fd fd) : fd_(std::move(fd)) {}
  Fd fd_;
};

// Whether faults wait to be read, also of a blocking userfaultfd, which poll(2) does
// not tell: from /proc/self/fdinfo (userfaultfd_show_fdinfo() of Linux's
// fs/userfaultfd.c), which takes 0.6 us. Of one thread.
class UffdQueue {
 public:
  static Result<UffdQueue> open(const Uffd& uffd);
  bool has_events() const;

 private:
  Fd info_;
};

// Whether a descriptor that somebody gave us is a userfaultfd at all.
bool is_userfaultfd(const Fd& fd);

// Feature bits, with those that Debian 12's kernel header does not know.
namespace uffd_feature {
inline constexpr uint64_t pagefault_flag_wp = 1 << 0;
inline constexpr uint64_t event_fork = 1 << 1;
inline constexpr uint64_t event_remap = 1 << 2;
inline constexpr uint64_t event_remove = 1 << 3;
inline constexpr uint64_t missing_hugetlbfs = 1 << 4;
inline constexpr uint64_t missing_shmem = 1 << 5;
inline constexpr uint64_t event_unmap = 1 << 6;
inline constexpr uint64_t thread_id = 1 << 8;
inline constexpr uint64_t wp_hugetlbfs_shmem = 1 << 12;  // Linux 5.19
inline constexpr uint64_t wp_unpopulated = 1 << 13;      // 6.4
inline constexpr uint64_t poison = 1 << 14;              // 6.6
}  // namespace uffd_feature

}  // namespace vmsnap
