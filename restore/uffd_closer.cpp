#include "restore/uffd_closer.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "formats/log.h"
#include "snap/vmm/caretaker.h"
#include "snap/vmm/handover.h"

namespace vmsnap {

namespace {

// In the child; its exit status.
int wait_and_close(const RestoreRecord& record, int word) {
  become_caretaker("snapcloser");
  if (word > 3) ::close_range(3, static_cast<unsigned>(word) - 1, 0);
  ::close_range(static_cast<unsigned>(word) + 1, ~0U, 0);
  char byte;
  if (::read(word, &byte, 1) != 1) return 0;  // the server has ended
  const auto process = find_process(record);
  const Status closed =
      process ? close_in_process(*process, record.uffd) : Status(tl::unexpected(process.error()));
  if (closed) return 0;
  log_line(LogLevel::error, closed.error().message());
  return exit_status(closed.error().code());
}

}  // namespace

Result<UffdCloser> UffdCloser::start(const RestoreRecord& record) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) < 0) return fail_errno(errno, "cannot make a pipe");
  Fd theirs(ends[0]);
  UffdCloser closer;
  closer.word_ = Fd(ends[1]);
  closer.vm_ = record.pid;
  closer.child_ = ::fork();
  if (closer.child_ < 0) return fail_errno(errno, "cannot start a process");
  if (closer.child_ == 0) ::_exit(wait_and_close(record, theirs.get()));
  return closer;
}

Status UffdCloser::close() {
  if (::write(word_.get(), "c", 1) < 0) return fail_errno(errno, "cannot reach process {}", child_);
  word_.reset();
  int status = 0;
  pid_t ended;
  do {
    ended = ::waitpid(child_, &status, 0);
  } while (ended < 0 && errno == EINTR);
  if (ended == child_ && WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
  return fail(ErrorCode::vm, "cannot close our userfaultfd in process {}", vm_);
}

}  // namespace vmsnap
