#include "snap/vmm/handover.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <optional>

#include "formats/test_point.h"
#include "snap/vmm/descriptor_message.h"
#include "snap/vmm/injector.h"

// Linux 6.1; newer than some kernel headers.
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

namespace vmsnap {

namespace {

constexpr const char* device_path = "/dev/userfaultfd";
constexpr const char* qmp_name = "vmsnap-uffd";
constexpr uint64_t uffd_flags = O_CLOEXEC | O_NONBLOCK;

// What the child asks its parent in the middle of the errand.
constexpr int64_t thread_is_seized = -1;  // any other number: the new descriptor's
enum Answer : int64_t { go_on = 0, close_it = 1, keep_it = 2, nobody = 3 };

// How the borrowed thread makes the descriptor: its number, or -errno.
using Maker = std::function<Result<int64_t>(RemoteThread&)>;

// Runs `make` in the VMM, takes the descriptor over, and, unless it is to be
// kept there, has the VMM's copy closed before the thread is let go. Whenever
// we die, the child closes it.
Result<HandedUffd> make_and_take(const Process& process, const Maker& make, KeepInVmm keep) {
  Result<Fd> taken = fail(ErrorCode::vm, "no userfaultfd came out of {}", process.describe());
  HandedUffd handed;
  const auto errand = [&](RemoteThread& thread, InjectorLink& link) -> Result<int64_t> {
    // Whoever stood still is not to take a descriptor later, which may be another by then.
    if (link.ask(thread_is_seized, nobody) == nobody) return tl::unexpected(stood_still(process));
    const int64_t made = VMSNAP_TRY(make(thread));
    if (made < 0) return made;
    const int64_t answer = link.ask(made, nobody);
    if (answer != keep_it) VMSNAP_TRY(thread.call(SYS_close, {static_cast<uint64_t>(made)}));
    if (answer == nobody) return tl::unexpected(stood_still(process));
    return made;
  };
  const auto answer = [&](int64_t number) -> int64_t {
    if (number == thread_is_seized) {
      VMSNAP_TEST_POINT("attach.seized");
      return go_on;
    }
    taken = process.take_descriptor(static_cast<int>(number));
    VMSNAP_TEST_POINT("attach.created");
    return taken && keep == KeepInVmm::yes ? keep_it : close_it;
  };
  const int64_t made = VMSNAP_TRY(run_injected(process, errand, answer));
  if (made < 0) {
    return tl::unexpected(Error::from_errno(static_cast<int>(-made),
                                            process.describe() + " cannot make a userfaultfd",
                                            ErrorCode::privilege));
  }
  handed.uffd = Uffd::adopt(VMSNAP_TRY(std::move(taken)));
  if (keep == KeepInVmm::yes) handed.remote_fd = static_cast<int>(made);
  return handed;
}

// Descriptors of the process that are open on /dev/userfaultfd.
Result<std::vector<int>> device_descriptors(const Process& process) {
  std::vector<int> numbers;
  for (const auto& [number, target] : VMSNAP_TRY(process.descriptors())) {
    if (target.ends_with(device_path)) numbers.push_back(number);
  }
  return numbers;
}

// The way for QEMU, whatever its privileges: the monitor takes the open device.
Result<HandedUffd> by_monitor(const Process& process, Qmp& qmp, KeepInVmm keep) {
  const Fd device = VMSNAP_TRY(open_file(device_path, O_RDWR));
  const std::vector<int> before = VMSNAP_TRY(device_descriptors(process));
  VMSNAP_TRY(qmp.execute("getfd", {{"fdname", qmp_name}}, {device.get()}));
  Result<HandedUffd> handed =
      fail(ErrorCode::vm, "{} took no descriptor over its monitor", process.describe());
  if (const auto after = device_descriptors(process)) {
    for (const int number : *after) {
      if (std::find(before.begin(), before.end(), number) != before.end()) continue;
      handed = make_and_take(
          process,
          [number](RemoteThread& thread) {
            return thread.call(SYS_ioctl, {static_cast<uint64_t>(number), USERFAULTFD_IOC_NEW, uffd_flags});
          },
          keep);
      break;
    }
  }
  if (const auto closed = qmp.execute("closefd", {{"fdname", qmp_name}}); !closed && handed) {
    return tl::unexpected(closed.error());
  }
  return handed;
}

// The plain way: works when the process has CAP_SYS_PTRACE, or the host allows
// everybody (vm.unprivileged_userfaultfd).
Result<HandedUffd> by_system_call(const Process& process, KeepInVmm keep) {
  return make_and_take(
      process,
      [](RemoteThread& thread) -> Result<int64_t> {
        VMSNAP_CHECK(thread.check_unfiltered());
        return thread.call(SYS_userfaultfd, {uffd_flags});
      },
      keep);
}

// For a process without privileges and without a monitor: it is made to
// connect to a socket of ours, over which it gets the open device.
class DeviceOffer {
 public:
  static Result<DeviceOffer> make() {
    DeviceOffer offer;
    offer.device_ = VMSNAP_TRY(open_file(device_path, O_RDWR));
    offer.listener_ = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    uint64_t random[2];
    if (!offer.listener_ || ::getrandom(random, sizeof random, 0) != sizeof random) {
      return fail_errno(errno, "cannot make a socket");
    }
    // An abstract name that cannot be guessed; only the one connection counts.
    const std::string name = fmt::format("vmsnap-{:016x}{:016x}", random[0], random[1]);
    offer.address_.sun_family = AF_UNIX;
    std::memcpy(offer.address_.sun_path + 1, name.data(), name.size());
    offer.length_ = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
    if (::bind(offer.listener_.get(), reinterpret_cast<sockaddr*>(&offer.address_), offer.length_) < 0 ||
        ::listen(offer.listener_.get(), 1) < 0) {
      return fail_errno(errno, "cannot listen on a socket");
    }
    return offer;
  }

  // In the child: connect, send from this side, receive on that one. Returns
  // the number of the device in the process.
  Result<int64_t> hand_to(RemoteThread& thread, const Process& process) const {
    // Laid out for the remote thread: the address, then a message header with
    // room for one descriptor.
    struct Layout {
      sockaddr_un address;
      alignas(16) msghdr header;
      iovec bytes;
      char byte;
      alignas(16) char control[CMSG_SPACE(sizeof(int))];
    } layout = {};
    const RemotePtr at = VMSNAP_TRY(thread.scratch(sizeof layout));
    const auto remote = [&](size_t offset) { return reinterpret_cast<void*>((at + offset).address()); };
    layout.address = address_;
    layout.bytes = {remote(offsetof(Layout, byte)), 1};
    layout.header.msg_iov = static_cast<iovec*>(remote(offsetof(Layout, bytes)));
    layout.header.msg_iovlen = 1;
    layout.header.msg_control = remote(offsetof(Layout, control));
    layout.header.msg_controllen = sizeof layout.control;
    VMSNAP_CHECK(process.write(at, std::as_bytes(std::span(&layout, 1))));

    const int64_t socket =
        VMSNAP_TRY(thread.call(SYS_socket, {AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0}));
    if (socket < 0) return socket;
    const auto number = static_cast<uint64_t>(socket);
    int64_t result = VMSNAP_TRY(thread.call(SYS_connect, {number, at.address(), length_}));
    if (result >= 0 && send_device()) {
      result = VMSNAP_TRY(thread.call(
          SYS_recvmsg, {number, (at + offsetof(Layout, header)).address(), MSG_CMSG_CLOEXEC}));
    }
    VMSNAP_TRY(thread.call(SYS_close, {number}));
    if (result < 0) return result;
    VMSNAP_CHECK(process.read(at, std::as_writable_bytes(std::span(&layout, 1))));
    cmsghdr header;
    std::memcpy(&header, layout.control, sizeof header);
    if (result != 1 || header.cmsg_type != SCM_RIGHTS) return -EPROTO;
    int device = -1;
    std::memcpy(&device, layout.control + CMSG_LEN(0), sizeof device);
    return device;
  }

 private:
  bool send_device() const {
    const Fd connection(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    const std::byte byte{'d'};
    const int device = device_.get();
    return connection && send_with_descriptors(connection.get(), {&byte, 1}, {&device, 1}) == 1;
  }

  Fd device_, listener_;
  sockaddr_un address_ = {};
  socklen_t length_ = 0;
};

Result<HandedUffd> by_socket(const Process& process, KeepInVmm keep) {
  const DeviceOffer offer = VMSNAP_TRY(DeviceOffer::make());
  return make_and_take(
      process,
      [&](RemoteThread& thread) -> Result<int64_t> {
        VMSNAP_CHECK(thread.check_unfiltered());
        const int64_t device = VMSNAP_TRY(offer.hand_to(thread, process));
        if (device < 0) return device;
        const auto number = static_cast<uint64_t>(device);
        const int64_t made =
            VMSNAP_TRY(thread.call(SYS_ioctl, {number, USERFAULTFD_IOC_NEW, uffd_flags}));
        VMSNAP_TRY(thread.call(SYS_close, {number}));
        return made;
      },
      keep);
}

}  // namespace

Result<HandedUffd> bring_out_uffd(const Process& process, Qmp* qmp, uint64_t features, KeepInVmm keep) {
  Result<HandedUffd> handed = fail(ErrorCode::privilege, "");
  std::string tried;
  const auto attempt = [&](const char* way, Result<HandedUffd> outcome) {
    if (!outcome) tried += fmt::format("{}{}: {}", tried.empty() ? "" : "; ", way, outcome.error().message());
    handed = std::move(outcome);
    return handed || handed.error().code() == ErrorCode::refused || !process.alive();
  };
  bool done = qmp && attempt("by its monitor", by_monitor(process, *qmp, keep));
  done = done || attempt("by userfaultfd(2)", by_system_call(process, keep));
  done = done || (!qmp && attempt("by a socket", by_socket(process, keep)));
  if (!handed) {
    if (handed.error().code() == ErrorCode::refused || !process.alive()) return handed;
    return tl::unexpected(
        Error(ErrorCode::privilege,
              fmt::format("cannot get a userfaultfd out of {} ({})", process.describe(), tried))
            .with_remedy("Run vmsnap as root on a kernel with /dev/userfaultfd (Linux 6.1), or set "
                         "vm.unprivileged_userfaultfd=1."));
  }
  Fd raw(::fcntl(handed->uffd.fd(), F_DUPFD_CLOEXEC, 0));
  if (!raw) return fail_errno(errno, "cannot duplicate a descriptor");
  handed->uffd = VMSNAP_TRY(Uffd::initialize(std::move(raw), features));
  VMSNAP_TEST_POINT("attach.detached");
  return handed;
}

Result<Uffd> take_userfaultfd(const Process& process, int remote_fd) {
  Fd fd = VMSNAP_TRY(process.take_descriptor(remote_fd));
  if (is_userfaultfd(fd)) return Uffd::adopt(std::move(fd));
  return fail(ErrorCode::damaged, "descriptor {} of {} is no userfaultfd", remote_fd,
              process.describe());
}

Status close_in_process(const Process& process, int remote_fd) {
  const int64_t closed = VMSNAP_TRY(run_injected(
      process, [remote_fd](RemoteThread& thread, InjectorLink&) {
        return thread.call(SYS_close, {static_cast<uint64_t>(remote_fd)});
      }));
  if (closed < 0) {
    return fail_errno(static_cast<int>(-closed), "cannot close a descriptor in {}", process.describe());
  }
  return {};
}

}  // namespace vmsnap
