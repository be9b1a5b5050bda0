#include "snap/vmm/ksm_pause.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace vmsnap {

namespace {

constexpr const char* switch_path = "/sys/kernel/mm/ksm/run";
constexpr const char* record_path = "/run/vmsnap-ksm";  // "1" while we have ksmd paused

bool lock(int fd, short type, bool wait) {
  struct flock request = {};
  request.l_type = type;
  request.l_whence = SEEK_SET;
  for (;;) {
    if (::fcntl(fd, wait ? F_OFD_SETLKW : F_OFD_SETLK, &request) == 0) return true;
    if (errno != EINTR) return false;
  }
}

Status set_running(bool running) {
  const Fd fd = VMSNAP_TRY(open_file(switch_path, O_WRONLY));
  // Returns after ksmd has finished the batch it is in.
  return write_all(fd.get(), std::as_bytes(std::span(running ? "1" : "0", 1)), switch_path);
}

bool recorded(int fd) {
  char byte = '0';
  return ::pread(fd, &byte, 1, 0) == 1 && byte == '1';
}

}  // namespace

Result<KsmPause> KsmPause::begin() {
  KsmPause pause;
  Fd fd = VMSNAP_TRY(open_file(record_path, O_RDWR | O_CREAT));
  if (!lock(fd.get(), F_RDLCK, true)) return fail_errno(errno, "cannot lock {}", record_path);
  // Nobody puts it back while we have the lock. Others may be here, and have found it
  // standing still; it may have been started since.
  const std::string running = VMSNAP_TRY(read_small_file(switch_path));
  if (running.starts_with("1")) {
    VMSNAP_CHECK(write_all_at(fd.get(), std::as_bytes(std::span("1", 1)), 0, record_path));
    VMSNAP_CHECK(set_running(false));
  }
  pause.lock_ = std::move(fd);
  return pause;
}

void KsmPause::end() {
  if (!lock_) return;
  // First given up: of two who leave at once, each would keep the other from having it
  // alone. Not by closing it: the guard has it open, too.
  lock(lock_.get(), F_UNLCK, false);
  if (lock(lock_.get(), F_WRLCK, false) && recorded(lock_.get())) {
    (void)set_running(true);
    (void)write_all_at(lock_.get(), std::as_bytes(std::span("0", 1)), 0, record_path);
  }
  lock(lock_.get(), F_UNLCK, false);
  lock_.reset();
}

}  // namespace vmsnap
