#include "snap/vmm/uffd.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>

namespace vmsnap {

namespace {

// UFFDIO_POISON (Linux 6.6) is newer than Debian 12's kernel header.
struct PoisonArgument {
  uffdio_range range;
  uint64_t mode;
  int64_t updated;
};
constexpr unsigned long uffdio_poison = _IOWR(UFFDIO, 0x08, PoisonArgument);

uffdio_range raw(RemoteRange range) { return {range.start.address(), range.length}; }

Error ioctl_error(const char* what, RemoteRange range, int os_errno) {
  const ErrorCode code = os_errno == ESRCH ? ErrorCode::vm : ErrorCode::io;
  return Error::from_errno(os_errno,
                           fmt::format("{} failed at {:#x} (+{:#x})", what,
                                       range.start.address(), range.length),
                           code);
}

std::string feature_names(uint64_t features) {
  struct Name {
    uint64_t bit;
    const char* text;
  };
  static constexpr std::array names = {
      Name{uffd_feature::pagefault_flag_wp, "write protection (Linux 5.7)"},
      Name{uffd_feature::event_remove, "remove events (Linux 4.11)"},
      Name{uffd_feature::missing_hugetlbfs, "hugetlbfs (Linux 4.11)"},
      Name{uffd_feature::missing_shmem, "shared memory (Linux 4.11)"},
      Name{uffd_feature::thread_id, "thread numbers (Linux 4.14)"},
      Name{uffd_feature::wp_hugetlbfs_shmem, "write protection of shared memory (Linux 5.19)"},
      Name{uffd_feature::poison, "poisoned pages (Linux 6.6)"},
  };
  std::string text;
  for (const Name& name : names) {
    if (!(features & name.bit)) continue;
    if (!text.empty()) text += ", ";
    text += name.text;
    features &= ~name.bit;
  }
  if (features) text += fmt::format(" and {:#x}", features);
  return text;
}

// The outcome of UFFDIO_COPY, ZEROPAGE and POISON. `moved` is the kernel's own
// count: bytes done, or a negative errno when nothing was.
Result<Uffd::Copied> fill_outcome(const char* what, RemoteRange range, int returned, int64_t moved) {
  const int why = errno;
  Uffd::Copied copied;
  copied.bytes = moved > 0 ? static_cast<uint64_t>(moved) : 0;
  if (returned == 0) {
    copied.bytes = range.length;
    return copied;
  }
  switch (why) {
    case EAGAIN: copied.outcome = CopyOutcome::try_again; return copied;
    case EEXIST: copied.outcome = CopyOutcome::already_there; return copied;
    case ENOENT: copied.outcome = CopyOutcome::no_mapping; return copied;
    case ENOMEM: copied.outcome = CopyOutcome::no_memory; return copied;
    default: return tl::unexpected(ioctl_error(what, range, why));
  }
}

}  // namespace

Result<uint64_t> Uffd::kernel_features() {
  // User-mode-only needs no privilege and offers the same features.
  const Fd fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY)));
  if (!fd) return fail_errno(errno, "cannot make a userfaultfd");
  uffdio_api api = {.api = UFFD_API, .features = 0, .ioctls = 0};
  if (::ioctl(fd.get(), UFFDIO_API, &api) < 0) return fail_errno(errno, "UFFDIO_API failed");
  return api.features;
}

Result<Uffd> Uffd::initialize(Fd fd, uint64_t features) {
  // Asked of a descriptor of its own, because UFFDIO_API with a feature that
  // the kernel lacks ends the use of the descriptor.
  const uint64_t offered = VMSNAP_TRY(kernel_features());
  if (features & ~offered) {
    return tl::unexpected(Error(ErrorCode::unsupported,
                                "this kernel's userfaultfd has no " +
                                    feature_names(features & ~offered))
                              .with_remedy("Use a newer kernel (Linux 6.1 has all that is needed)."));
  }
  uffdio_api api = {.api = UFFD_API, .features = features, .ioctls = 0};
  if (::ioctl(fd.get(), UFFDIO_API, &api) < 0) return fail_errno(errno, "UFFDIO_API failed");
  return Uffd(std::move(fd));
}

Status Uffd::make_nonblocking() const { return set_nonblocking(fd(), true, "a userfaultfd"); }
Status Uffd::make_blocking() const { return set_nonblocking(fd(), false, "a userfaultfd"); }

Result<RegisterOutcome> Uffd::register_range(RemoteRange range, RegisterMode mode) const {
  uffdio_register request = {};
  request.range = raw(range);
  if (mode.missing) request.mode |= UFFDIO_REGISTER_MODE_MISSING;
  if (mode.write_protect) request.mode |= UFFDIO_REGISTER_MODE_WP;
  if (::ioctl(fd(), UFFDIO_REGISTER, &request) == 0) {
    const bool can_protect = request.ioctls & (uint64_t{1} << _UFFDIO_WRITEPROTECT);
    if (mode.write_protect && !can_protect) return RegisterOutcome::unsupported;
    return RegisterOutcome::done;
  }
  if (errno == EBUSY) return RegisterOutcome::busy;
  if (errno == EINVAL || errno == EPERM) return RegisterOutcome::unsupported;
  return tl::unexpected(ioctl_error("UFFDIO_REGISTER", range, errno));
}

Status Uffd::unregister_range(RemoteRange range) const {
  uffdio_range request = raw(range);
  // The kernel wakes who waits for a missing page, not who waits to write; and does
  // it before it takes the range away: a fault under the lock of its mapping alone
  // (Linux 6.6 and later) may begin to wait in between, and nobody would wake it.
  if (::ioctl(fd(), UFFDIO_UNREGISTER, &request) == 0) return wake(range);
  return tl::unexpected(ioctl_error("UFFDIO_UNREGISTER", range, errno));
}

namespace {

Result<ProtectOutcome> change_protection(int fd, RemoteRange range, uint64_t mode) {
  uffdio_writeprotect request = {.range = raw(range), .mode = mode};
  if (::ioctl(fd, UFFDIO_WRITEPROTECT, &request) == 0) return ProtectOutcome::done;
  if (errno == EAGAIN) return ProtectOutcome::try_again;
  if (errno == ENOENT) return ProtectOutcome::no_mapping;
  return tl::unexpected(ioctl_error("UFFDIO_WRITEPROTECT", range, errno));
}

}  // namespace

Result<ProtectOutcome> Uffd::write_protect(RemoteRange range) const {
  return change_protection(fd(), range, UFFDIO_WRITEPROTECT_MODE_WP);
}

Result<ProtectOutcome> Uffd::unprotect(RemoteRange range) const {
  return change_protection(fd(), range, 0);
}

static_assert(Uffd::message_bytes == sizeof(uffd_msg));

Result<std::vector<UffdEvent>> Uffd::read_events(size_t limit) const {
  std::array<std::byte, 64 * message_bytes> buffer;
  const size_t wanted = std::min(buffer.size(), limit * message_bytes);
  return parse_messages(VMSNAP_TRY(read_messages(std::span(buffer).first(wanted))));
}

Result<std::span<const std::byte>> Uffd::read_messages(std::span<std::byte> buffer) const {
  iovec into = {buffer.data(), buffer.size()};
  ssize_t got = ::preadv2(fd(), &into, 1, -1, RWF_NOWAIT);
  if (got < 0 && (errno == EOPNOTSUPP || errno == ESPIPE)) {
    got = ::read(fd(), buffer.data(), buffer.size());
  }
  if (got < 0 && errno != EAGAIN && errno != EINTR) {
    return fail_errno(errno, "cannot read the events of a userfaultfd");
  }
  const auto messages = buffer.first(got > 0 ? static_cast<size_t>(got) : 0);
  for (size_t at = 0; at + message_bytes <= messages.size(); at += message_bytes) {
    uffd_msg message;
    std::memcpy(&message, messages.data() + at, sizeof message);
    // A descriptor of the child's memory came along; nobody here wants it.
    if (message.event == UFFD_EVENT_FORK) ::close(static_cast<int>(message.arg.fork.ufd));
  }
  return messages;
}

Result<std::optional<UffdEvent>> Uffd::wait_for_event() const {
  std::array<std::byte, message_bytes> message;
  const ssize_t got = ::read(fd(), message.data(), message.size());
  if (got < 0 && errno == EINTR) return std::nullopt;
  if (got < 0) return fail_errno(errno, "cannot read the events of a userfaultfd");
  const auto events = parse_messages(std::span(message).first(static_cast<size_t>(got)));
  return events.empty() ? std::nullopt : std::optional(events[0]);
}

Result<UffdQueue> UffdQueue::open(const Uffd& uffd) {
  UffdQueue queue;
  queue.info_ = VMSNAP_TRY(open_file(fmt::format("/proc/self/fdinfo/{}", uffd.fd()), O_RDONLY));
  return queue;
}

bool UffdQueue::has_events() const {
  constexpr std::string_view name = "pending:\t";
  std::array<char, 512> text;
  const ssize_t got = ::pread(info_.get(), text.data(), text.size(), 0);
  const std::string_view lines(text.data(), got > 0 ? static_cast<size_t>(got) : 0);
  const size_t at = lines.find(name);
  return at != std::string_view::npos && at + name.size() < lines.size() && lines[at + name.size()] != '0';
}

std::vector<UffdEvent> Uffd::parse_messages(std::span<const std::byte> messages) {
  std::vector<UffdEvent> events(messages.size() / message_bytes);
  for (size_t i = 0; i < events.size(); ++i) {
    uffd_msg message;
    std::memcpy(&message, messages.data() + i * message_bytes, sizeof message);
    UffdEvent& event = events[i];
    switch (message.event) {
      case UFFD_EVENT_PAGEFAULT: {
        const uint64_t flags = message.arg.pagefault.flags;
        event.kind = flags & UFFD_PAGEFAULT_FLAG_WP ? UffdEvent::Kind::write_protect
                                                    : UffdEvent::Kind::missing;
        event.write = flags & UFFD_PAGEFAULT_FLAG_WRITE;
        event.address = RemotePtr(message.arg.pagefault.address & ~uint64_t{4095});
        event.thread = static_cast<pid_t>(message.arg.pagefault.feat.ptid);
        break;
      }
      case UFFD_EVENT_REMOVE:
      case UFFD_EVENT_UNMAP:
        event.kind = message.event == UFFD_EVENT_REMOVE ? UffdEvent::Kind::removed
                                                        : UffdEvent::Kind::unmapped;
        event.address = RemotePtr(message.arg.remove.start);
        event.length = message.arg.remove.end - message.arg.remove.start;
        break;
      case UFFD_EVENT_REMAP:
        event.kind = UffdEvent::Kind::moved;
        event.address = RemotePtr(message.arg.remap.from);
        event.length = message.arg.remap.len;
        break;
      case UFFD_EVENT_FORK: event.kind = UffdEvent::Kind::forked; break;
      default: event.kind = UffdEvent::Kind::other;
    }
  }
  return events;
}

Result<Uffd::Copied> Uffd::copy(RemotePtr to, std::span<const std::byte> pages,
                                CopyMode mode) const {
  uffdio_copy request = {};
  request.dst = to.address();
  request.src = reinterpret_cast<uint64_t>(pages.data());
  request.len = pages.size();
  const bool protect = mode == CopyMode::write_protected;
  request.mode = protect ? UFFDIO_COPY_MODE_WP : 0;
  const int returned = ::ioctl(fd(), UFFDIO_COPY, &request);
  if (returned < 0 && errno == EINVAL && protect) return Copied{CopyOutcome::cannot_protect, 0};
  return fill_outcome("UFFDIO_COPY", {to, pages.size()}, returned, request.copy);
}

Result<Uffd::Copied> Uffd::zero(RemoteRange range, bool wake_waiters) const {
  uffdio_zeropage request = {};
  request.range = raw(range);
  request.mode = wake_waiters ? 0 : UFFDIO_ZEROPAGE_MODE_DONTWAKE;
  const int returned = ::ioctl(fd(), UFFDIO_ZEROPAGE, &request);
  return fill_outcome("UFFDIO_ZEROPAGE", range, returned, request.zeropage);
}

Result<Uffd::Copied> Uffd::poison(RemoteRange range) const {
  PoisonArgument request = {.range = raw(range), .mode = 0, .updated = 0};
  const int returned = ::ioctl(fd(), uffdio_poison, &request);
  return fill_outcome("UFFDIO_POISON", range, returned, request.updated);
}

Status Uffd::wake(RemoteRange range) const {
  uffdio_range request = raw(range);
  if (::ioctl(fd(), UFFDIO_WAKE, &request) == 0) return {};
  return tl::unexpected(ioctl_error("UFFDIO_WAKE", range, errno));
}

bool is_userfaultfd(const Fd& fd) {
  std::error_code failed;
  const auto target =
      std::filesystem::read_symlink(fmt::format("/proc/self/fd/{}", fd.get()), failed);
  return !failed && target.string() == "anon_inode:[userfaultfd]";
}

}  // namespace vmsnap
