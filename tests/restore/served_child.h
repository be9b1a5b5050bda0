// A process whose memory is served: it touches pages when told to and shows
// what it saw.
#pragma once

#include <linux/userfaultfd.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <optional>
#include <thread>

#include "restore/page_source.h"
#include "snap/vmm/process.h"
#include "snap/vmm/uffd.h"
#include "tests/restore/test_image.h"

namespace vmsnap::testing {

enum class MemoryKind { anonymous, shared, huge };

// How the child makes its userfaultfd.
struct ChildUffd {
  bool write_protect = false;  // registers for that, too
  bool unmap_events = false;
};

class ServedChild {
 public:
  // Null (and the test is to be skipped) when the machine has no such memory.
  static std::unique_ptr<ServedChild> start(uint64_t pages, MemoryKind kind = MemoryKind::anonymous,
                                            ChildUffd manner = {}) {
    std::unique_ptr<ServedChild> child(new ServedChild(pages, kind, manner));
    return child->begin() ? std::move(child) : nullptr;
  }
  // One that has mapped `file` privately, as a clone has.
  static std::unique_ptr<ServedChild> start_clone(uint64_t pages, int file) {
    std::unique_ptr<ServedChild> child(new ServedChild(pages, MemoryKind::anonymous, {}));
    child->clone_of_ = file;
    return child->begin() ? std::move(child) : nullptr;
  }
  ~ServedChild() {
    if (pid_ <= 0) return;
    kill();
    ::munmap(shown_, shown_bytes());
  }

  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

  const Process& process() const { return *process_; }
  int remote_uffd() const { return shown_->uffd; }
  // Another descriptor of the userfaultfd that the child keeps.
  Uffd take_uffd() const {
    auto fd = process_->take_descriptor(shown_->uffd);
    EXPECT_TRUE(fd) << fd.error().message();
    return Uffd::adopt(*std::move(fd));
  }
  std::vector<ServedRange> ranges(uint64_t first_page = 0) const {
    const uint64_t unit = kind_ == MemoryKind::huge ? 2 << 20 : page_size;
    return {{{RemotePtr(shown_->address), pages_ * page_size}, first_page, unit, "range0"}};
  }

  // What the child reads in a page; nothing if that was a SIGBUS.
  std::optional<Page> read(uint64_t page) {
    tell('r', page);
    return shown(page);
  }
  // The same by a thread of its own: begin_read() does not wait for it.
  void begin_read(uint64_t page) { tell('t', page); }
  bool has_read(uint64_t page) const { return seen()[page].load() != 0; }
  std::optional<Page> shown(uint64_t page) const {
    if (seen()[page].load() != 1) return std::nullopt;
    Page bytes;
    std::memcpy(bytes.data(), shown_pages() + page * page_size, page_size);
    return bytes;
  }
  void write(uint64_t page) { tell('w', page); }
  void give_back(uint64_t page, uint64_t count) { tell('d', page, count); }
  void unmap(uint64_t page, uint64_t count) { tell('m', page, count); }
  void unregister(uint64_t page, uint64_t count) { tell('u', page, count); }
  // fallocate(2): no event tells of it.
  void punch_hole(uint64_t page, uint64_t count) { tell('p', page, count); }

  static Page written_page() {
    Page bytes;
    bytes.fill(std::byte{0xab});
    return bytes;
  }

 private:
  struct Shown {  // shared with the child
    uint64_t address;
    int uffd;
  };
  struct Command {
    char what;
    uint64_t page, count;
  };

  ServedChild(uint64_t pages, MemoryKind kind, ChildUffd manner)
      : pages_(pages), kind_(kind), manner_(manner) {}

  size_t shown_bytes() const {
    return page_size * (1 + pages_) + pages_ * sizeof(std::atomic<int>);
  }
  std::byte* shown_pages() const { return reinterpret_cast<std::byte*>(shown_) + page_size; }
  std::atomic<int>* seen() const {
    return reinterpret_cast<std::atomic<int>*>(shown_pages() + pages_ * page_size);
  }

  bool begin() {
    shown_ = static_cast<Shown*>(
        ::mmap(nullptr, shown_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    int ends[2];
    if (shown_ == MAP_FAILED || ::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) {
      std::abort();
    }
    pid_ = ::fork();
    if (pid_ == 0) live(ends[1]);
    link_ = Fd(ends[0]);
    ::close(ends[1]);
    char ready = 0;
    if (::read(link_.get(), &ready, 1) != 1) {
      ::waitpid(pid_, nullptr, 0);
      pid_ = 0;
      return false;
    }
    process_.emplace(*Process::open(pid_));
    return true;
  }

  void tell(char what, uint64_t page, uint64_t count = 1) {
    const Command command = {what, page, count};
    ASSERT_EQ(::write(link_.get(), &command, sizeof command), ssize_t{sizeof command});
    char done = 0;
    ASSERT_EQ(::read(link_.get(), &done, 1), 1) << "the child died";
  }

  // The child from here on.
  static inline thread_local sigjmp_buf bus_error;

  void look(std::byte* memory, uint64_t page) {
    Page bytes;
    if (sigsetjmp(bus_error, 1) != 0) {
      seen()[page].store(2);
      return;
    }
    std::memcpy(bytes.data(), memory + page * page_size, page_size);
    std::lock_guard lock(showing_);  // another thread may look at the same page
    std::memcpy(shown_pages() + page * page_size, bytes.data(), page_size);
    seen()[page].store(1);
  }

  [[noreturn]] void live(int link) {
    // SIGSEGV: memory that was unmapped before a thread came to look.
    for (const int number : {SIGBUS, SIGSEGV}) {
      ::signal(number, [](int) { siglongjmp(bus_error, 1); });
    }
    int file = -1;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    if (kind_ == MemoryKind::shared) {
      file = ::memfd_create("served", MFD_CLOEXEC);
      if (::ftruncate(file, static_cast<off_t>(pages_ * page_size)) < 0) ::_exit(1);
      flags = MAP_SHARED;
    }
    if (kind_ == MemoryKind::huge) flags |= MAP_HUGETLB;
    if (clone_of_ >= 0) {
      file = clone_of_;
      flags = MAP_PRIVATE;
    }
    void* memory = ::mmap(nullptr, pages_ * page_size, PROT_READ | PROT_WRITE, flags, file, 0);
    if (memory == MAP_FAILED) ::_exit(2);
    const int uffd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE, .ioctls = 0};
    if (manner_.write_protect) api.features |= UFFD_FEATURE_PAGEFAULT_FLAG_WP;
    if (manner_.unmap_events) api.features |= UFFD_FEATURE_EVENT_UNMAP;
    uffdio_register request = {};
    request.range = {reinterpret_cast<uint64_t>(memory), pages_ * page_size};
    request.mode = UFFDIO_REGISTER_MODE_MISSING;
    if (manner_.write_protect) request.mode |= UFFDIO_REGISTER_MODE_WP;
    if (uffd < 0 || ::ioctl(uffd, UFFDIO_API, &api) < 0 ||
        ::ioctl(uffd, UFFDIO_REGISTER, &request) < 0) {
      ::_exit(3);
    }
    shown_->address = reinterpret_cast<uint64_t>(memory);
    shown_->uffd = uffd;
    auto* bytes = static_cast<std::byte*>(memory);
    char reply = 'k';
    [[maybe_unused]] ssize_t ignored = ::write(link, &reply, 1);
    Command command;
    while (::read(link, &command, sizeof command) == ssize_t{sizeof command}) {
      std::byte* at = bytes + command.page * page_size;
      switch (command.what) {
        case 'r':
          look(bytes, command.page);
          break;
        case 't':
          std::thread([=, this] { look(bytes, command.page); }).detach();
          break;
        case 'w':
          std::memset(at, 0xab, page_size);
          break;
        case 'd':
          // Of shared memory MADV_DONTNEED keeps the content.
          ::madvise(at, command.count * page_size,
                    kind_ == MemoryKind::shared ? MADV_REMOVE : MADV_DONTNEED);
          break;
        case 'm':
          ::munmap(at, command.count * page_size);
          break;
        case 'u': {
          uffdio_range range = {reinterpret_cast<uint64_t>(at), command.count * page_size};
          ::ioctl(uffd, UFFDIO_UNREGISTER, &range);
          break;
        }
        case 'p':
          ::fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      static_cast<off_t>(command.page * page_size),
                      static_cast<off_t>(command.count * page_size));
          break;
      }
      ignored = ::write(link, &reply, 1);
    }
    ::_exit(0);
  }

  uint64_t pages_;
  MemoryKind kind_;
  int clone_of_ = -1;
  ChildUffd manner_;
  pid_t pid_ = 0;
  Fd link_;
  std::optional<Process> process_;
  Shown* shown_ = nullptr;
  std::mutex showing_;  // of the child
};

}  // namespace vmsnap::testing
