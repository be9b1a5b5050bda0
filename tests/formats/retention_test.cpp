// Which snapshots are kept, and why: restic's rules on a calendar made by hand.
#include "formats/retention.h"

#include <gtest/gtest.h>
#include <time.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "tests/formats/time_zone.h"

namespace vmsnap {
namespace {

using Reasons = std::vector<std::string>;

int64_t utc(int year, int month, int day, int hour = 0, int minute = 0) {
  std::tm time = {};
  time.tm_year = year - 1900;
  time.tm_mon = month - 1;
  time.tm_mday = day;
  time.tm_hour = hour;
  time.tm_min = minute;
  return int64_t{::timegm(&time)} * 1000;
}

const int64_t far_future = utc(2100, 1, 1);

class RetentionTest : public testing::Test {
 protected:
  void add(std::string id, int64_t created, TagList tags = {}, std::string vm = "vm1") {
    items_.push_back({std::move(id), std::move(vm), created, std::move(tags)});
  }

  // The ids that are kept, sorted.
  std::set<std::string> kept(const KeepRule& rule, int64_t now = far_future) const {
    const auto decisions = apply_keep_rule(items_, rule, now);
    EXPECT_TRUE(decisions) << decisions.error().message();
    std::set<std::string> ids;
    for (size_t i = 0; i < items_.size(); ++i) {
      if (decisions->at(i).keep) ids.insert(items_[i].id);
      EXPECT_EQ(decisions->at(i).keep, !decisions->at(i).reasons.empty());
    }
    return ids;
  }

  std::map<std::string, Reasons> reasons(const KeepRule& rule, int64_t now = far_future) const {
    const auto decisions = apply_keep_rule(items_, rule, now);
    EXPECT_TRUE(decisions) << decisions.error().message();
    std::map<std::string, Reasons> found;
    for (size_t i = 0; i < items_.size(); ++i) found[items_[i].id] = decisions->at(i).reasons;
    return found;
  }

  using Ids = std::set<std::string>;
  TimeZone zone_{"UTC"};
  std::vector<RetentionItem> items_;
};

TEST_F(RetentionTest, LastKeepsTheNewestWhateverTheOrder) {
  add("b", utc(2026, 5, 2));
  add("d", utc(2026, 5, 4));
  add("a", utc(2026, 5, 1));
  add("c", utc(2026, 5, 3));
  EXPECT_EQ(kept({.last = 1}), Ids({"d"}));
  EXPECT_EQ(kept({.last = 3}), Ids({"b", "c", "d"}));
  EXPECT_EQ(kept({.last = 9}), Ids({"a", "b", "c", "d"}));
  EXPECT_EQ(kept({.last = KeepRule::unlimited}), Ids({"a", "b", "c", "d"}));
}

TEST_F(RetentionTest, DailyKeepsTheNewestOfEachDayThatHasOne) {
  add("1a", utc(2026, 5, 1, 8));
  add("1b", utc(2026, 5, 1, 20));
  add("5a", utc(2026, 5, 5, 0, 0));  // the first and the last minute of a day
  add("5b", utc(2026, 5, 5, 23, 59));
  add("6a", utc(2026, 5, 6, 0, 0));
  EXPECT_EQ(kept({.daily = 1}), Ids({"6a"}));
  EXPECT_EQ(kept({.daily = 2}), Ids({"5b", "6a"}));
  EXPECT_EQ(kept({.daily = 3}), Ids({"1b", "5b", "6a"}));  // days without one do not count
  EXPECT_EQ(kept({.daily = 4}), Ids({"1a", "1b", "5b", "6a"}));
}

TEST_F(RetentionTest, WhatIsLeftOfACountKeepsTheOldest) {
  add("a", utc(2026, 5, 1, 8));
  add("b", utc(2026, 5, 1, 9));
  add("c", utc(2026, 5, 1, 10));
  const auto found = reasons({.daily = 2});
  EXPECT_EQ(found.at("c"), Reasons({"daily snapshot"}));
  EXPECT_EQ(found.at("b"), Reasons());
  EXPECT_EQ(found.at("a"), Reasons({"oldest daily snapshot"}));
  EXPECT_EQ(kept({.daily = 1}), Ids({"c"}));
  EXPECT_EQ(kept({.daily = KeepRule::unlimited}), Ids({"a", "c"}));
}

TEST_F(RetentionTest, ResticsExampleOfTwelveSundays) {
  const std::vector<std::pair<int, int>> sundays = {{9, 1},   {9, 8},   {9, 15},  {9, 22},
                                                    {9, 29},  {10, 6},  {10, 13}, {10, 20},
                                                    {10, 27}, {11, 3},  {11, 10}, {11, 17}};
  for (const auto& [month, day] : sundays) {
    add(fmt::format("{:02}-{:02}", month, day), utc(2019, month, day, 11));
  }
  EXPECT_EQ(kept({.daily = 4}), Ids({"10-27", "11-03", "11-10", "11-17"}));
  EXPECT_EQ(kept({.weekly = 4}), Ids({"10-27", "11-03", "11-10", "11-17"}));
  EXPECT_EQ(kept({.monthly = 2}), Ids({"10-27", "11-17"}));
}

TEST_F(RetentionTest, HoursMonthsAndYears) {
  add("a", utc(2024, 12, 31, 23, 10));
  add("b", utc(2024, 12, 31, 23, 50));
  add("c", utc(2025, 1, 1, 0, 5));
  add("d", utc(2025, 1, 1, 1, 0));
  add("e", utc(2026, 1, 1, 1, 0));  // the same month and hour of another year
  EXPECT_EQ(kept({.hourly = 4}), Ids({"b", "c", "d", "e"}));
  EXPECT_EQ(kept({.monthly = 2}), Ids({"d", "e"}));
  EXPECT_EQ(kept({.monthly = 3}), Ids({"b", "d", "e"}));
  EXPECT_EQ(kept({.yearly = 3}), Ids({"b", "d", "e"}));
  EXPECT_EQ(kept({.yearly = 2}), Ids({"d", "e"}));
}

TEST_F(RetentionTest, WeeksAreIsoWeeksAlsoOverTheNewYear) {
  add("2020-12-27 sun", utc(2020, 12, 27));  // 2020-W52
  add("2020-12-28 mon", utc(2020, 12, 28));  // 2020-W53, until January 3
  add("2020-12-31 thu", utc(2020, 12, 31));
  add("2021-01-03 sun", utc(2021, 1, 3, 23, 59));
  add("2021-01-04 mon", utc(2021, 1, 4));  // 2021-W01
  EXPECT_EQ(kept({.weekly = 3}), Ids({"2020-12-27 sun", "2021-01-03 sun", "2021-01-04 mon"}));

  items_.clear();
  add("2024-12-29 sun", utc(2024, 12, 29));  // 2024-W52
  add("2024-12-30 mon", utc(2024, 12, 30));  // 2025-W01
  add("2025-01-01 wed", utc(2025, 1, 1));
  add("2025-12-29 mon", utc(2025, 12, 29));  // 2026-W01: not the same as 2025-W01
  EXPECT_EQ(kept({.weekly = 3}), Ids({"2024-12-29 sun", "2025-01-01 wed", "2025-12-29 mon"}));
}

// The oracle is strftime's %G-%V, which knows ISO weeks by itself.
TEST_F(RetentionTest, WeeksAreThoseOfStrftime) {
  std::map<std::string, std::string> newest_of_week;
  for (int64_t at = utc(1999, 12, 20, 12); at < utc(2032, 1, 10); at += 86400000) {
    const std::time_t seconds = at / 1000;
    std::tm time = {};
    ::gmtime_r(&seconds, &time);
    char week[32];
    ASSERT_GT(std::strftime(week, sizeof week, "%G-%V", &time), 0u);
    const std::string id = std::to_string(at);
    add(id, at);
    newest_of_week[week] = id;
  }
  Ids expected = {items_.front().id};  // the oldest
  for (const auto& [week, id] : newest_of_week) expected.insert(id);
  EXPECT_EQ(kept({.weekly = KeepRule::unlimited}), expected);
}

TEST_F(RetentionTest, MomentsBefore1970AreInTheDayTheyAreIn) {
  add("a", utc(1969, 12, 31, 1));
  add("b", utc(1969, 12, 31, 23) - 1);
  add("c", utc(1970, 1, 1));
  add("start", -1);
  EXPECT_EQ(kept({.daily = 2}), Ids({"c", "start"}));
  EXPECT_EQ(kept({.hourly = 3}), Ids({"b", "c", "start"}));
}

TEST_F(RetentionTest, BucketsAreLocal) {
  add("a", utc(2026, 5, 1, 21, 30));  // 23:30 in Berlin
  add("b", utc(2026, 5, 1, 22, 30));  // 0:30 of the next day
  EXPECT_EQ(kept({.daily = 1}), Ids({"b"}));
  const TimeZone berlin("Europe/Berlin");
  EXPECT_EQ(kept({.daily = 2}), Ids({"a", "b"}));
  EXPECT_EQ(reasons({.daily = 2}).at("a"), Reasons({"daily snapshot"}));
}

TEST_F(RetentionTest, TheDayThatHas23Hours) {
  const TimeZone berlin("Europe/Berlin");
  // March 29, 2026: 1:59 CET is followed by 3:00 CEST.
  add("old", utc(2026, 3, 27, 12));
  add("sat", utc(2026, 3, 28, 22, 59));  // 23:59 on Saturday
  add("sun 0", utc(2026, 3, 28, 23));    // 0:00 on Sunday
  add("sun 1", utc(2026, 3, 29, 0, 59));
  add("sun 3", utc(2026, 3, 29, 1, 0));
  add("sun 23", utc(2026, 3, 29, 21, 59));
  add("mon", utc(2026, 3, 29, 22));  // 0:00 on Monday, CEST
  EXPECT_EQ(kept({.daily = 3}), Ids({"sat", "sun 23", "mon"}));
  EXPECT_EQ(kept({.weekly = 2}), Ids({"sun 23", "mon"}));
  EXPECT_EQ(kept({.hourly = 5}), Ids({"sun 0", "sun 1", "sun 3", "sun 23", "mon"}));
}

TEST_F(RetentionTest, TheDayThatHas25Hours) {
  const TimeZone berlin("Europe/Berlin");
  // October 25, 2026: 2:59 CEST is followed by 2:00 CET.
  add("old", utc(2026, 10, 20));
  add("sat", utc(2026, 10, 24, 21, 59));
  add("sun 0", utc(2026, 10, 24, 22));
  add("sun 2 summer", utc(2026, 10, 25, 0, 30));
  add("sun 2 winter", utc(2026, 10, 25, 1, 30));
  add("sun 3", utc(2026, 10, 25, 2));
  add("sun 23", utc(2026, 10, 25, 22, 59));
  add("mon", utc(2026, 10, 25, 23));
  EXPECT_EQ(kept({.daily = 3}), Ids({"sat", "sun 23", "mon"}));
  EXPECT_EQ(kept({.weekly = 2}), Ids({"sun 23", "mon"}));
  // The clock on the wall shows one hour of two, as for restic.
  EXPECT_EQ(kept({.hourly = 4}), Ids({"sun 2 winter", "sun 3", "sun 23", "mon"}));
  EXPECT_EQ(kept({.hourly = 5}), Ids({"sun 0", "sun 2 winter", "sun 3", "sun 23", "mon"}));
}

TEST_F(RetentionTest, WithinCountsFromTheNewestNotFromNow) {
  add("a", utc(2026, 4, 24, 12));
  add("b", utc(2026, 4, 24, 12) + 1);
  add("c", utc(2026, 5, 1, 12));
  EXPECT_EQ(kept({.within = CalendarDuration{0, 0, 7, 0}}), Ids({"b", "c"}));
  EXPECT_EQ(kept({.within = CalendarDuration{0, 0, 7, 1}}), Ids({"a", "b", "c"}));
  EXPECT_EQ(reasons({.within = CalendarDuration{0, 0, 7, 0}}).at("c"), Reasons({"within 7d"}));
}

// What restic keeps: the month that is before 0:30 on April 1 begins at 0:30 on
// March 1, although in UTC that is a month before March 31.
TEST_F(RetentionTest, WithinIsOnTheLocalCalendar) {
  const TimeZone berlin("Europe/Berlin");
  Ids expected;
  for (int day = 1; day <= 31; ++day) {
    const bool summer = day > 29;
    add(fmt::format("03-{:02}", day), utc(2026, 3, day, 0, 30) - (summer ? 2 : 1) * 3'600'000);
    if (day > 1) expected.insert(items_.back().id);
  }
  add("04-01", utc(2026, 3, 31, 22, 30));
  expected.insert("04-01");
  EXPECT_EQ(kept({.within = CalendarDuration{0, 1, 0, 0}}), expected);
}

// Seven days of which one has 25 hours; an hour is one everywhere.
TEST_F(RetentionTest, WithinDaysOfTheAutumnChange) {
  const TimeZone berlin("Europe/Berlin");
  add("10-21 12:00", utc(2026, 10, 21, 10));
  add("10-21 12:30", utc(2026, 10, 21, 10, 30));
  add("10-21 13:00", utc(2026, 10, 21, 11));
  add("10-28 12:00", utc(2026, 10, 28, 11));
  EXPECT_EQ(kept({.within = CalendarDuration{0, 0, 7, 0}}),
            Ids({"10-21 12:30", "10-21 13:00", "10-28 12:00"}));
  EXPECT_EQ(kept({.within = CalendarDuration{0, 0, 0, 7 * 24}}), Ids({"10-28 12:00"}));
}

TEST_F(RetentionTest, Tags) {
  add("a", utc(2026, 5, 1), {"nightly", "x"});
  add("b", utc(2026, 5, 2), {"nightly"});
  add("c", utc(2026, 5, 3), {});
  EXPECT_EQ(kept({.keep_tags = {{"nightly"}}}), Ids({"a", "b"}));
  EXPECT_EQ(kept({.keep_tags = {{"x", "nightly"}}}), Ids({"a"}));
  EXPECT_EQ(kept({.keep_tags = {{"x"}, {}}}), Ids({"a", "c"}));
  EXPECT_EQ(reasons({.keep_tags = {{"nightly"}, {"x", "nightly"}}}).at("a"),
            Reasons({"tag nightly", "tag x,nightly"}));
  EXPECT_EQ(reasons({.keep_tags = {{}}}).at("c"), Reasons({"no tags"}));
  add("d", utc(2026, 5, 4), {"backup:web"});
  EXPECT_EQ(kept({.keep_tags = {{}}}), Ids({"c", "d"}));
}

TEST_F(RetentionTest, AllReasonsAreGiven) {
  add("a", utc(2026, 5, 1), {"t"});
  const KeepRule rule = {.last = 1, .hourly = 1, .daily = 1, .weekly = 1, .monthly = 1, .yearly = 1,
                         .within = CalendarDuration{1, 0, 0, 0}, .keep_tags = {{"t"}}};
  EXPECT_EQ(reasons(rule).at("a"),
            Reasons({"last snapshot", "hourly snapshot", "daily snapshot", "weekly snapshot",
                     "monthly snapshot", "yearly snapshot", "within 1y", "tag t"}));
}

TEST_F(RetentionTest, EachVmIsAGroupOfItsOwn) {
  add("1a", utc(2026, 5, 1), {}, "vm1");
  add("2a", utc(2026, 5, 1), {}, "vm2");
  add("1b", utc(2026, 5, 2), {}, "vm1");
  add("3a", utc(2020, 5, 2), {}, "vm3");
  EXPECT_EQ(kept({.last = 1}), Ids({"1b", "2a", "3a"}));
  EXPECT_EQ(kept({.within = CalendarDuration{0, 0, 0, 1}}), Ids({"1b", "2a", "3a"}));
}

TEST_F(RetentionTest, OfTwoAtTheSameTimeTheGreaterIdIsTheNewer) {
  const int64_t when = utc(2026, 5, 1);
  for (const bool reversed : {false, true}) {
    items_.clear();
    for (const char* id : {"a", "b", "c"}) add(id, when);
    if (reversed) std::reverse(items_.begin(), items_.end());
    EXPECT_EQ(kept({.last = 1}), Ids({"c"}));
    EXPECT_EQ(kept({.last = 2}), Ids({"b", "c"}));
    EXPECT_EQ(kept({.daily = 1}), Ids({"c"}));
    EXPECT_EQ(kept({.within = CalendarDuration{0, 0, 0, 1}}), Ids({"a", "b", "c"}));
  }
}

TEST_F(RetentionTest, TheFutureIsKeptAndCountsForNothing) {
  const int64_t now = utc(2026, 5, 10);
  add("old", utc(2026, 5, 1));
  add("now", now);
  add("later", now + 1);
  add("never", INT64_MAX);
  EXPECT_EQ(kept({.last = 1}, now), Ids({"now", "later", "never"}));
  EXPECT_EQ(reasons({.last = 1}, now).at("later"), Reasons({"in the future"}));
  // "within" counts from the newest that is not in the future.
  EXPECT_EQ(kept({.within = CalendarDuration{0, 0, 10, 0}}, now),
            Ids({"old", "now", "later", "never"}));
  EXPECT_EQ(kept({.keep_tags = {{"t"}}}, now), Ids({"later", "never"}));
}

TEST_F(RetentionTest, ARuleThatKeepsNothingIsRefused) {
  add("a", utc(2026, 5, 1));
  for (const bool empty : {false, true}) {
    if (empty) items_.clear();
    const auto decisions = apply_keep_rule(items_, {}, far_future);
    ASSERT_FALSE(decisions);
    EXPECT_EQ(decisions.error().code(), ErrorCode::usage);
    EXPECT_NE(decisions.error().message().find("would remove every snapshot"), std::string::npos);
  }
  EXPECT_TRUE(check_keep_rule({.keep_tags = {{}}}));
  EXPECT_TRUE(check_keep_rule({.yearly = KeepRule::unlimited}));
  EXPECT_TRUE(apply_keep_rule(items_, {.last = 1}, far_future));
}

TEST_F(RetentionTest, ATagThatNoSnapshotOfAVmHasIsRefused) {
  add("1a", utc(2026, 5, 1), {"t"}, "vm1");
  add("2a", utc(2026, 5, 1), {}, "vm2");
  const auto decisions = apply_keep_rule(items_, {.keep_tags = {{"t"}}}, far_future);
  ASSERT_FALSE(decisions);
  EXPECT_EQ(decisions.error().code(), ErrorCode::usage);
  EXPECT_NE(decisions.error().message().find("'vm2'"), std::string::npos);
}

TEST_F(RetentionTest, ExtremeTimesDoNotOverflow) {
  for (const int64_t when : {INT64_MIN, INT64_MIN + 1, int64_t{0}, INT64_MAX - 1, INT64_MAX}) {
    add(std::to_string(when), when);
  }
  const KeepRule rule = {.last = 1, .hourly = 1, .daily = 1, .weekly = 1, .monthly = 1, .yearly = 1,
                         .within = CalendarDuration{10000, 10000, 10000, 10000}};
  EXPECT_TRUE(kept(rule, INT64_MAX).contains(std::to_string(INT64_MAX)));
  EXPECT_EQ(kept(rule, INT64_MIN).size(), items_.size());
}

// Random sets: a greater count never keeps less, the newest is kept by any
// count, and no count keeps more than itself of a VM.
TEST_F(RetentionTest, RandomSetsObeyTheLaws) {
  const TimeZone berlin("Europe/Berlin");
  std::mt19937_64 random(20261121);
  int KeepRule::* const counts[] = {&KeepRule::last,   &KeepRule::hourly,  &KeepRule::daily,
                                    &KeepRule::weekly, &KeepRule::monthly, &KeepRule::yearly};
  const int64_t now = utc(2026, 5, 1);
  for (int round = 0; round < 300; ++round) {
    items_.clear();
    // Sets of an hour up to some years, so that every kind of bucket is shared.
    const int64_t span = int64_t{3'600'000} << random() % 16;
    const size_t size = 1 + random() % 40;
    for (size_t i = 0; i < size; ++i) {
      add(std::to_string(i), now - static_cast<int64_t>(random() % span) / 1000 * 1000);
    }
    const RetentionItem& newest = *std::max_element(
        items_.begin(), items_.end(), [](const RetentionItem& a, const RetentionItem& b) {
          return std::tie(a.created_unix_ms, a.id) < std::tie(b.created_unix_ms, b.id);
        });
    for (int KeepRule::* const count : counts) {
      Ids before;
      for (const int n : {1, 2, 3, 5, 8, 100}) {
        KeepRule rule;
        rule.*count = n;
        const Ids now_kept = kept(rule);
        EXPECT_TRUE(now_kept.contains(newest.id));
        EXPECT_LE(now_kept.size(), static_cast<size_t>(n));
        EXPECT_TRUE(std::includes(now_kept.begin(), now_kept.end(), before.begin(), before.end()));
        before = now_kept;
      }
      KeepRule all;
      all.*count = KeepRule::unlimited;
      EXPECT_EQ(kept(all), before);  // 100 is more than there are
    }
    // Two rules together keep what each of them keeps.
    const KeepRule a = {.daily = 3}, b = {.last = 4}, both = {.last = 4, .daily = 3};
    Ids united = kept(a);
    united.merge(Ids(kept(b)));
    EXPECT_EQ(kept(both), united);
  }
}

}  // namespace
}  // namespace vmsnap
