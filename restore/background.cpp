#include "restore/background.h"

#include <fcntl.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "formats/log.h"

namespace vmsnap {

HeldSignals::HeldSignals() {
  sigset_t held;
  ::sigemptyset(&held);
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) ::sigaddset(&held, number);
  ::pthread_sigmask(SIG_BLOCK, &held, &before_);
}

HeldSignals::~HeldSignals() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

void become_background(const std::string& log_path) {
  ::setsid();
  // SIGTERM ends it like any process: the guest waits, --reattach goes on.
  for (const int number : {SIGINT, SIGHUP}) ::signal(number, SIG_IGN);
  ::signal(SIGTERM, SIG_DFL);
  const int null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  const int log = ::open(log_path.c_str(),
                         O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  ::dup2(null, 0);
  ::dup2(null, 1);
  ::dup2(log >= 0 ? log : null, 2);
  set_log_sink([](LogLevel level, std::string_view line) {
    if (level == LogLevel::debug) return;
    timespec now = {};
    ::clock_gettime(CLOCK_REALTIME, &now);
    const std::string text = fmt::format("{}.{:03} {}\n", now.tv_sec, now.tv_nsec / 1000000, line);
    [[maybe_unused]] const ssize_t put = ::write(2, text.data(), text.size());
  });
}

}  // namespace vmsnap
