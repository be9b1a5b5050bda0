// LD_PRELOAD library: a VMM that pins memory of its own and has the kernel write
// through that, as a block driver with registered buffers does (io_uring_register(2)).
//
// Listens at the UNIX socket PIN_SOCKET for one client, whose lines are
//   pin ADDRESS LENGTH     registers that much as a buffer
//   write ADDRESS BYTE     has a page of BYTE read into it, which is in the buffer
// with hexadecimal numbers; answers "0" or the errno.
#include <errno.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <thread>

namespace {

constexpr size_t page_bytes = 4096;

// One request at a time.
class Ring {
 public:
  Ring() {
    io_uring_params parameters = {};
    fd_ = static_cast<int>(::syscall(SYS_io_uring_setup, 4, &parameters));
    const auto map = [&](off_t what, size_t bytes) {
      return static_cast<char*>(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, what));
    };
    char* const submissions = map(IORING_OFF_SQ_RING, page_bytes);
    char* const completions = map(IORING_OFF_CQ_RING, page_bytes);
    entry_ = reinterpret_cast<io_uring_sqe*>(map(IORING_OFF_SQES, page_bytes));
    tail_ = reinterpret_cast<std::atomic<uint32_t>*>(submissions + parameters.sq_off.tail);
    array_ = reinterpret_cast<uint32_t*>(submissions + parameters.sq_off.array);
    mask_ = *reinterpret_cast<uint32_t*>(submissions + parameters.sq_off.ring_mask);
    done_head_ = reinterpret_cast<std::atomic<uint32_t>*>(completions + parameters.cq_off.head);
    done_mask_ = *reinterpret_cast<uint32_t*>(completions + parameters.cq_off.ring_mask);
    done_ = reinterpret_cast<io_uring_cqe*>(completions + parameters.cq_off.cqes);
  }

  int pin(uint64_t address, uint64_t length) {
    iovec buffer = {reinterpret_cast<void*>(address), length};
    return ::syscall(SYS_io_uring_register, fd_, IORING_REGISTER_BUFFERS, &buffer, 1) < 0 ? errno : 0;
  }

  int write(uint64_t address, int byte) {
    char page[page_bytes];
    ::memset(page, byte, sizeof page);
    const int file = ::memfd_create("page", MFD_CLOEXEC);
    if (::pwrite(file, page, sizeof page, 0) != static_cast<ssize_t>(sizeof page)) return errno;
    *entry_ = {};
    entry_->opcode = IORING_OP_READ_FIXED;
    entry_->fd = file;
    entry_->addr = address;
    entry_->len = page_bytes;
    const uint32_t tail = tail_->load();
    array_[tail & mask_] = 0;
    tail_->store(tail + 1);
    const long entered = ::syscall(SYS_io_uring_enter, fd_, 1, 1, IORING_ENTER_GETEVENTS, nullptr, 0);
    const int failed = entered == 1 ? 0 : errno;
    ::close(file);
    if (failed) return failed;
    const uint32_t head = done_head_->load();
    const int result = done_[head & done_mask_].res;
    done_head_->store(head + 1);
    return result < 0 ? -result : 0;
  }

 private:
  int fd_ = -1;
  io_uring_sqe* entry_ = nullptr;
  std::atomic<uint32_t>*tail_ = nullptr, *done_head_ = nullptr;
  uint32_t* array_ = nullptr;
  uint32_t mask_ = 0, done_mask_ = 0;
  io_uring_cqe* done_ = nullptr;
};

void serve(int listener) {
  Ring ring;
  FILE* const client = ::fdopen(::accept(listener, nullptr, nullptr), "r+");
  char line[128];
  while (client && ::fgets(line, sizeof line, client)) {
    unsigned long address = 0, value = 0;
    int answer = EINVAL;
    if (::sscanf(line, "pin %lx %lx", &address, &value) == 2) {
      answer = ring.pin(address, value);
    } else if (::sscanf(line, "write %lx %lx", &address, &value) == 2) {
      answer = ring.write(address, static_cast<int>(value));
    }
    ::fprintf(client, "%d\n", answer);
    ::fflush(client);
  }
}

__attribute__((constructor)) void start() {
  const char* const path = ::getenv("PIN_SOCKET");
  if (!path) return;
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  ::strncpy(name.sun_path, path, sizeof name.sun_path - 1);
  const int listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (::bind(listener, reinterpret_cast<sockaddr*>(&name), sizeof name) < 0 || ::listen(listener, 1) < 0) return;
  std::thread(serve, listener).detach();
}

}  // namespace
