#include "snap/vmm/injector.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "snap/vmm/caretaker.h"

namespace vmsnap {

namespace {

// What goes over the socket pair, child to parent. Whole messages
// (SOCK_SEQPACKET), both ends the same program.
struct Message {
  enum class Kind { question, value, error } kind = Kind::value;
  int64_t number = 0;
  int code = 0;
  char text[480] = {};
  char remedy[256] = {};
};

bool send_message(int fd, const Message& message) {
  return ::send(fd, &message, sizeof message, MSG_NOSIGNAL) == sizeof message;
}

Message error_message(const Error& error) {
  Message message;
  message.kind = Message::Kind::error;
  message.code = static_cast<int>(error.code());
  std::strncpy(message.text, error.message().c_str(), sizeof message.text - 1);
  std::strncpy(message.remedy, error.remedy().c_str(), sizeof message.remedy - 1);
  return message;
}

constexpr timeval longest_answer = {.tv_sec = 2, .tv_usec = 0};

void outlive_parent() {
  become_caretaker("snapinject");
  // Being chosen by the out-of-memory killer here would cost the VM as well.
  (void)write_all(open_file("/proc/self/oom_score_adj", O_WRONLY).value_or(Fd()).get(),
                  std::as_bytes(std::span("-1000", 5)), "oom_score_adj");
}

}  // namespace

int64_t InjectorLink::ask(int64_t number, int64_t otherwise) const {
  Message question;
  question.kind = Message::Kind::question;
  question.number = number;
  int64_t reply = 0;
  if (!send_message(fd_, question)) return otherwise;
  return ::recv(fd_, &reply, sizeof reply, 0) == sizeof reply ? reply : otherwise;
}

Error stood_still(const Process& process) {
  return Error(ErrorCode::vm, fmt::format("vmsnap stood still while a thread of {} waited for it",
                                          process.describe()));
}

Result<int64_t> run_injected(const Process& process,
                             const std::function<Result<int64_t>(RemoteThread&, InjectorLink&)>& errand,
                             const std::function<int64_t(int64_t)>& answer) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) {
    return fail_errno(errno, "cannot make a socket pair");
  }
  Fd ours(ends[0]), theirs(ends[1]);
  const pid_t child = ::fork();
  if (child < 0) return fail_errno(errno, "cannot fork");
  if (child == 0) {
    ours.reset();
    outlive_parent();
    ::setsockopt(theirs.get(), SOL_SOCKET, SO_RCVTIMEO, &longest_answer, sizeof longest_answer);
    InjectorLink link(theirs.get());
    Message last;
    {
      auto thread = RemoteThread::seize(process);
      const Result<int64_t> value =
          thread ? errand(*thread, link) : Result<int64_t>(tl::unexpected(thread.error()));
      if (value) {
        last.number = *value;
      } else {
        last = error_message(value.error());
      }
    }  // here the thread is put back and let go, before the parent hears of it
    send_message(theirs.get(), last);
    ::_exit(0);
  }
  theirs.reset();

  Result<int64_t> outcome = fail(ErrorCode::vm, "the helper that traced {} was killed", process.describe());
  for (;;) {
    Message message;
    const ssize_t got = ::recv(ours.get(), &message, sizeof message, 0);
    // ECONNRESET, once: it ended without reading an answer that came too late. What it
    // said before is still to be read.
    if (got < 0 && (errno == EINTR || errno == ECONNRESET)) continue;
    if (got != sizeof message) break;
    if (message.kind == Message::Kind::question) {
      const int64_t reply = answer ? answer(message.number) : 0;
      ::send(ours.get(), &reply, sizeof reply, MSG_NOSIGNAL);
      continue;
    }
    if (message.kind == Message::Kind::value) {
      outcome = message.number;
    } else {
      outcome = tl::unexpected(
          Error(static_cast<ErrorCode>(message.code), message.text).with_remedy(message.remedy));
    }
    break;
  }
  while (::waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  return outcome;
}

}  // namespace vmsnap
