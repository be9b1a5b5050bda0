#include "formats/json.h"

#include <gtest/gtest.h>

namespace vmsnap {
namespace {

std::string arrays(size_t count) { return std::string(count, '[') + std::string(count, ']'); }

TEST(Json, IsReadAndWritten) {
  EXPECT_EQ(json_line(parse_json(R"( {"b": [1, "x"], "a": null} )")), R"({"a":null,"b":[1,"x"]})");
  EXPECT_EQ(json_lines(parse_json("[1]")), "[\n  1\n]\n");
}

TEST(Json, WhatIsNoneIsDiscarded) {
  for (const char* text : {"", "{", "[1,]", "1 2", "'a'", "\xff"}) {
    EXPECT_TRUE(parse_json(text).is_discarded()) << text;
  }
}

// Values are copied recursively: half a million arrays would be the end of the stack.
TEST(Json, WhatIsNestedTooDeepIsDiscarded) {
  EXPECT_FALSE(parse_json(arrays(max_json_nesting)).is_discarded());
  EXPECT_TRUE(parse_json(arrays(max_json_nesting + 1)).is_discarded());
  EXPECT_TRUE(parse_json(arrays(500'000)).is_discarded());
  // Only what is not in a string counts, and only what is open at the same time.
  EXPECT_FALSE(parse_json("[\"" + std::string(100, '[') + "\\\"" + std::string(100, '{') + "\"]").is_discarded());
  std::string wide = "[[]";
  for (int i = 0; i < 100; ++i) wide += ",[]";
  EXPECT_FALSE(parse_json(wide + "]").is_discarded());
}

TEST(Json, WhatIsNotUtf8IsReplaced) {
  EXPECT_EQ(json_line(nlohmann::json("a\xff")), "\"a\xef\xbf\xbd\"");
}

}  // namespace
}  // namespace vmsnap
