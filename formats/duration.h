// Durations as users write them: on the calendar, and on the clock.
//
// The two are kept apart because "m" is a month in the one and a minute in the
// other. Pure functions but for the local time zone; any thread may call them.
// What is not understood is ErrorCode::usage, with a remedy that shows an example.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "formats/error.h"

namespace vmsnap {

// Years, months, days and hours; how long an hour is known, how long a month is
// depends on where it is subtracted.
struct CalendarDuration {
  int years = 0, months = 0, days = 0, hours = 0;
  bool operator==(const CalendarDuration&) const = default;
};

// "2y5m7d3h", as restic-forget(1) takes it: m is months. Each unit at most once
// and in this order, each number at most 10000, the whole not zero.
Result<CalendarDuration> parse_calendar_duration(std::string_view text);

// The shortest text that parse_calendar_duration() reads as this.
std::string to_string(const CalendarDuration& duration);

// The moment that lies `duration` before `unix_ms`, both in milliseconds since
// 1970, on the calendar of the local time zone (localtime_r(3), environment
// variable TZ): days keep the time on the wall, hours are hours. A day that the
// month does not have runs over into the next month (a month before March 31 is
// March 3, or 2 in a leap year).
// Moments outside the years 1970 to 9999 are moved to the nearer end first.
int64_t subtract(int64_t unix_ms, const CalendarDuration& duration);

// "26h", "90m", "45s", "7d", "1h30m": m is minutes, a day is 24 hours. Each unit
// at most once and in the order d, h, m, s; not zero; at most 36500 days.
Result<std::chrono::seconds> parse_clock_duration(std::string_view text);

}  // namespace vmsnap
