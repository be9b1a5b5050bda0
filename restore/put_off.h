// Faults whose pages cannot be read at the moment: after a while all of them are to
// be tried again, together. No thread waits meanwhile.
#pragma once

#include <sys/timerfd.h>
#include <unistd.h>

#include <mutex>
#include <utility>
#include <vector>

#include "formats/file.h"

namespace vmsnap {

template <class Fault>
class PutOff {
 public:
  // False, and errno: there is no descriptor for it. Before all else.
  bool start() {
    timer_ = Fd(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
    return static_cast<bool>(timer_);
  }
  // Readable when it is time to take() them. Borrowed.
  int fd() const { return timer_.get(); }

  // Both from any thread; they do not block.
  void add(Fault fault) {
    std::lock_guard lock(mutex_);
    faults_.push_back(std::move(fault));
    if (faults_.size() > 1) return;  // the timer runs
    static constexpr long delay_ns = 100'000'000;
    const itimerspec once = {.it_interval = {}, .it_value = {0, delay_ns}};
    ::timerfd_settime(timer_.get(), 0, &once, nullptr);
  }
  std::vector<Fault> take() {
    uint64_t ignored;
    [[maybe_unused]] const ssize_t got = ::read(timer_.get(), &ignored, sizeof ignored);
    std::lock_guard lock(mutex_);
    return std::exchange(faults_, {});
  }

 private:
  Fd timer_;  // timerfd
  std::mutex mutex_;
  std::vector<Fault> faults_;
};

}  // namespace vmsnap
