// Durations as users write them, and what is no duration.
#include "formats/duration.h"

#include <gtest/gtest.h>

#include "formats/clock.h"
#include "tests/formats/time_zone.h"

namespace vmsnap {
namespace {

using namespace std::chrono;

int64_t utc_ms(int y, int m, int d, int hour = 0, int minute = 0) {
  return milliseconds((sys_days(year(y) / m / d) + hours(hour) + minutes(minute)).time_since_epoch())
      .count();
}

TEST(CalendarDuration, ReadsAllUnits) {
  EXPECT_EQ(parse_calendar_duration("2y5m7d3h").value(), (CalendarDuration{2, 5, 7, 3}));
  EXPECT_EQ(parse_calendar_duration("6m").value(), (CalendarDuration{0, 6, 0, 0}));
  EXPECT_EQ(parse_calendar_duration("1y36h").value(), (CalendarDuration{1, 0, 0, 36}));
  EXPECT_EQ(parse_calendar_duration("10000d").value(), (CalendarDuration{0, 0, 10000, 0}));
}

TEST(CalendarDuration, RefusesWhatIsNone) {
  for (const char* text :
       {"", "7", "d", "7w", "7d ", " 7d", "-7d", "+7d", "7d2", "3h7d", "7d7d", "1.5d", "0d", "0y0h",
        "10001d", "99999999999999999999d", "7D", "45s", "d7", "7dd", "1y-2m"}) {
    const auto parsed = parse_calendar_duration(text);
    ASSERT_FALSE(parsed) << text;
    EXPECT_EQ(parsed.error().code(), ErrorCode::usage);
    EXPECT_FALSE(parsed.error().remedy().empty());
  }
}

TEST(CalendarDuration, IsWrittenAsItIsRead) {
  for (const char* text : {"2y5m7d3h", "7d", "10000h", "1y1h"}) {
    EXPECT_EQ(to_string(parse_calendar_duration(text).value()), text);
  }
  EXPECT_EQ(to_string(parse_calendar_duration("1y0m0d1h").value()), "1y1h");
}

TEST(CalendarDuration, IsSubtractedOnTheCalendar) {
  const TimeZone utc("UTC");
  EXPECT_EQ(subtract(utc_ms(2026, 11, 21, 5, 30), {2, 5, 7, 3}), utc_ms(2024, 6, 14, 2, 30));
  EXPECT_EQ(subtract(utc_ms(2026, 1, 15), {0, 1, 0, 0}), utc_ms(2025, 12, 15));
  EXPECT_EQ(subtract(utc_ms(2026, 3, 1), {0, 0, 1, 0}), utc_ms(2026, 2, 28));
  EXPECT_EQ(subtract(utc_ms(2024, 3, 1), {0, 0, 1, 0}), utc_ms(2024, 2, 29));
  EXPECT_EQ(subtract(utc_ms(2026, 1, 1, 1), {0, 0, 0, 25}), utc_ms(2025, 12, 31));
  EXPECT_EQ(subtract(utc_ms(2026, 6, 15), {0, 30, 0, 0}), utc_ms(2023, 12, 15));
  EXPECT_EQ(subtract(utc_ms(2026, 6, 15) + 1, {0, 0, 1, 0}), utc_ms(2026, 6, 14) + 1);
}

TEST(CalendarDuration, AMissingDayRunsOver) {
  const TimeZone utc("UTC");
  EXPECT_EQ(subtract(utc_ms(2026, 3, 31), {0, 1, 0, 0}), utc_ms(2026, 3, 3));
  EXPECT_EQ(subtract(utc_ms(2024, 3, 31), {0, 1, 0, 0}), utc_ms(2024, 3, 2));
  EXPECT_EQ(subtract(utc_ms(2024, 2, 29), {1, 0, 0, 0}), utc_ms(2023, 3, 1));
}

// The same moments that Go's time.AddDate gives, and with it restic.
TEST(CalendarDuration, IsSubtractedOnTheLocalCalendar) {
  const TimeZone berlin("Europe/Berlin");
  EXPECT_EQ(subtract(utc_ms(2026, 3, 31, 22, 30), {0, 1, 0, 0}), utc_ms(2026, 2, 28, 23, 30));
  EXPECT_EQ(subtract(utc_ms(2026, 3, 30, 22, 30), {0, 1, 0, 0}), utc_ms(2026, 3, 2, 23, 30));
  EXPECT_EQ(subtract(utc_ms(2026, 7, 1), {0, 6, 0, 0}), utc_ms(2026, 1, 1, 1));
  EXPECT_EQ(subtract(utc_ms(2026, 10, 28, 11), {0, 0, 7, 0}), utc_ms(2026, 10, 21, 10));
  EXPECT_EQ(subtract(utc_ms(2026, 10, 28, 11), {0, 0, 7, 1}), utc_ms(2026, 10, 21, 9));
  EXPECT_EQ(subtract(utc_ms(2026, 10, 28, 11), {0, 0, 0, 168}), utc_ms(2026, 10, 21, 11));
  // 2:30 on the day on which it comes twice, and on the one without it.
  EXPECT_EQ(subtract(utc_ms(2026, 11, 1, 1, 30), {0, 0, 7, 0}), utc_ms(2026, 10, 25, 1, 30));
  EXPECT_EQ(subtract(utc_ms(2026, 4, 5, 0, 30), {0, 0, 7, 0}), utc_ms(2026, 3, 29, 1, 30));
}

TEST(CalendarDuration, ExtremesDoNotOverflow) {
  const TimeZone utc("UTC");
  const CalendarDuration longest = {10000, 10000, 10000, 10000};
  for (const int64_t moment : {INT64_MIN, int64_t{0}, utc_ms(2026, 1, 1), INT64_MAX}) {
    EXPECT_LT(subtract(moment, longest), utc_ms(2026, 1, 1));
  }
  EXPECT_EQ(subtract(INT64_MIN, {0, 0, 1, 0}), -86400000);
  EXPECT_EQ(subtract(INT64_MAX, {0, 0, 1, 0}), utc_ms(9999, 12, 31) - 1);
}

TEST(ClockDuration, ReadsAllUnits) {
  EXPECT_EQ(parse_clock_duration("26h").value(), hours(26));
  EXPECT_EQ(parse_clock_duration("90m").value(), minutes(90));
  EXPECT_EQ(parse_clock_duration("45s").value(), seconds(45));
  EXPECT_EQ(parse_clock_duration("7d").value(), hours(7 * 24));
  EXPECT_EQ(parse_clock_duration("1d2h3m4s").value(), seconds(93784));
  EXPECT_EQ(parse_clock_duration("36500d").value(), hours(36500 * 24));
  EXPECT_EQ(parse_clock_duration("3153600000s").value(), hours(36500 * 24));
}

TEST(ClockDuration, RefusesWhatIsNone) {
  for (const char* text : {"", "10", "m", "1y", "1w", "0s", "0d0h", "-1h", "1 h", "1h ", "30m1h", "1h1h",
                           "1.5h", "36500d1s", "36501d", "3153600001s", "9223372036854775807d",
                           "99999999999999999999s", "1H"}) {
    const auto parsed = parse_clock_duration(text);
    ASSERT_FALSE(parsed) << text;
    EXPECT_EQ(parsed.error().code(), ErrorCode::usage);
    EXPECT_FALSE(parsed.error().remedy().empty());
  }
}

TEST(ClockDuration, MIsMinutesHereAndMonthsThere) {
  EXPECT_EQ(parse_clock_duration("2m").value(), minutes(2));
  EXPECT_EQ(parse_calendar_duration("2m").value().months, 2);
}

TEST(ClockDuration, ALongTextIsCutInTheMessage) {
  const auto parsed = parse_clock_duration(std::string(100000, 'x'));
  ASSERT_FALSE(parsed);
  EXPECT_LT(parsed.error().message().size(), 200u);
}

TEST(Fresh, IsNeitherTooOldNorFromTheFuture) {
  constexpr int64_t now = 1'732'140'700'123, minute = 60'000;
  constexpr std::chrono::minutes limit{60};
  EXPECT_TRUE(is_fresh(now, now, limit));
  EXPECT_TRUE(is_fresh(now - 60 * minute, now, limit));
  EXPECT_FALSE(is_fresh(now - 60 * minute - 1, now, limit));
  // Clocks differ a little.
  EXPECT_TRUE(is_fresh(now + 5 * minute, now, limit));
  EXPECT_FALSE(is_fresh(now + 5 * minute + 1, now, limit));
  EXPECT_FALSE(is_fresh(253'402'300'799'999, 0, limit));
}

}  // namespace
}  // namespace vmsnap
