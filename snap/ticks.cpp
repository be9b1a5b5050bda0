#include "snap/ticks.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <utility>

// Of Linux; glibc 2.36 has no name for it.
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace vmsnap {

namespace {

constexpr int tick_signal = SIGURG;

thread_local volatile std::sig_atomic_t came = 0;

Status let_it_interrupt() {
  struct sigaction action = {};
  action.sa_handler = [](int) { came = 1; };  // and no SA_RESTART
  if (::sigaction(tick_signal, &action, nullptr) < 0) return fail_errno(errno, "cannot handle a signal");
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, tick_signal);
  ::pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  return {};
}

}  // namespace

Result<Ticks> Ticks::start(std::chrono::milliseconds interval) {
  VMSNAP_CHECK(let_it_interrupt());
  sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = tick_signal;
  event.sigev_notify_thread_id = ::gettid();
  timer_t timer;
  if (::timer_create(CLOCK_MONOTONIC, &event, &timer) < 0) return fail_errno(errno, "cannot make a timer");
  Ticks ticks(timer);
  const auto s = std::chrono::duration_cast<std::chrono::seconds>(interval);
  const timespec period = {s.count(), std::chrono::nanoseconds(interval - s).count()};
  const itimerspec wanted = {period, period};
  if (::timer_settime(timer, 0, &wanted, nullptr) < 0) return fail_errno(errno, "cannot start a timer");
  return ticks;
}

Ticks::Ticks(Ticks&& other) noexcept : timer_(other.timer_), ours_(std::exchange(other.ours_, false)) {}

Ticks::~Ticks() {
  if (ours_) ::timer_delete(timer_);
}

bool Ticks::take() {
  if (!came) return false;
  came = 0;
  return true;
}

void Ticks::interrupt(pid_t thread) { (void)::syscall(SYS_tgkill, ::getpid(), thread, tick_signal); }

}  // namespace vmsnap
