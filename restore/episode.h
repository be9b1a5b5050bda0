// For trouble that shows again and again while it lasts: it is said once.
#pragma once

#include <atomic>
#include <chrono>
#include <string>
#include <string_view>

#include "formats/error.h"

namespace vmsnap {

class Episode {
 public:
  // Called each time it shows. True if it had not for ten seconds: it is new.
  // Any thread.
  bool begins() {
    using std::chrono::steady_clock;
    static constexpr steady_clock::rep quiet = steady_clock::duration(std::chrono::seconds(10)).count();
    const steady_clock::rep now = steady_clock::now().time_since_epoch().count();
    const steady_clock::rep before = last_.exchange(now, std::memory_order_relaxed);
    return before == 0 || now - before > quiet;
  }

 private:
  std::atomic<std::chrono::steady_clock::rep> last_ = 0;  // 0: never
};

// Why pages are missing that nobody gave up; and that in the log, once an episode.
std::string delay_text(std::string_view whose, const Error& why);
void log_delay(Episode& delay, std::string_view whose, const Error& why);

}  // namespace vmsnap
