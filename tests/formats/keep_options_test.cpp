// The --keep options: what they set, and what they refuse.
#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <algorithm>

#include "formats/retention.h"

namespace vmsnap {
namespace {

KeepRule parse_options(std::vector<std::string> arguments) {
  KeepRule rule;
  CLI::App app;
  add_keep_options(app, rule);
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them
  app.parse(arguments);
  return rule;
}

TEST(KeepOptions, AllOfThem) {
  const KeepRule rule = parse_options(
      {"--keep-last", "1", "--keep-hourly", "2", "--keep-daily", "3", "--keep-weekly=4",
       "--keep-monthly", "5", "--keep-yearly", "unlimited", "--keep-within", "1y2m3d4h",
       "--keep-tag", "a", "--keep-tag", "b,c"});
  EXPECT_EQ(rule.last, 1);
  EXPECT_EQ(rule.hourly, 2);
  EXPECT_EQ(rule.daily, 3);
  EXPECT_EQ(rule.weekly, 4);
  EXPECT_EQ(rule.monthly, 5);
  EXPECT_EQ(rule.yearly, KeepRule::unlimited);
  EXPECT_EQ(rule.within, (CalendarDuration{1, 2, 3, 4}));
  EXPECT_EQ(rule.keep_tags, (std::vector<TagList>{{"a"}, {"b", "c"}}));
}

TEST(KeepOptions, NoneIsTheEmptyRule) { EXPECT_FALSE(check_keep_rule(parse_options({}))); }

TEST(KeepOptions, WrongValuesAreRefusedWithTheReason) {
  const auto message = [](std::vector<std::string> arguments) -> std::string {
    try {
      parse_options(std::move(arguments));
    } catch (const CLI::ParseError& error) {
      return error.what();
    }
    return "";
  };
  for (const char* wrong : {"-1", "x", "", "1.5", "2000000000", "99999999999999", "all"}) {
    EXPECT_NE(message({"--keep-daily", wrong}).find("is not a number of snapshots"),
              std::string::npos)
        << wrong << ": " << message({"--keep-daily", wrong});
  }
  EXPECT_NE(message({"--keep-within", "1w"}).find("is not a duration"), std::string::npos);
  EXPECT_EQ(message({"--keep-daily", "7"}), "");
}

TEST(KeepOptions, TagLists) {
  EXPECT_EQ(parse_tag_list("a"), TagList({"a"}));
  EXPECT_EQ(parse_tag_list("a,b"), TagList({"a", "b"}));
  EXPECT_EQ(parse_tag_list(",a,,b,"), TagList({"a", "b"}));
  EXPECT_EQ(parse_tag_list(""), TagList());
}

}  // namespace
}  // namespace vmsnap
