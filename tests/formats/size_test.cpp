#include "formats/size.h"

#include <gtest/gtest.h>

namespace vmsnap {
namespace {

TEST(Size, ReadsWhatPeopleWrite) {
  EXPECT_EQ(*parse_size("512"), 512u);
  EXPECT_EQ(*parse_size("64K"), 64u << 10);
  EXPECT_EQ(*parse_size("1.5G"), 3u << 29);
  EXPECT_EQ(*parse_size("2MiB"), 2u << 20);
  EXPECT_EQ(*parse_size("1T"), uint64_t{1} << 40);
}

TEST(Size, RefusesTheRest) {
  for (const char* text : {"", "0", "-1", "K", "1X", "1KB", "1 M", "0.5", "nan", "inf", "1e3", "9999999T", "5iB", "1MM"}) {
    const auto size = parse_size(text);
    ASSERT_FALSE(size) << text;
    EXPECT_EQ(size.error().code(), ErrorCode::usage);
  }
}

}  // namespace
}  // namespace vmsnap
