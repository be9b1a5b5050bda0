// Local time zones for tests.
#pragma once

#include <stdlib.h>
#include <time.h>

#include <optional>
#include <string>

namespace vmsnap {

// The local time zone, for the time of a test.
class TimeZone {
 public:
  explicit TimeZone(const char* name) {
    if (const char* before = ::getenv("TZ")) before_ = before;
    ::setenv("TZ", name, 1);
    ::tzset();
  }
  ~TimeZone() {
    before_ ? ::setenv("TZ", before_->c_str(), 1) : ::unsetenv("TZ");
    ::tzset();
  }
  TimeZone(const TimeZone&) = delete;
  TimeZone& operator=(const TimeZone&) = delete;

 private:
  std::optional<std::string> before_;
};

}  // namespace vmsnap
