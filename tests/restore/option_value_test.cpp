#include "restore/option_value.h"

#include <gtest/gtest.h>

namespace vmsnap {
namespace {

TEST(OptionValueText, ComesOutAsItWentIn) {
  for (const char* text : {"", "a", "a,b=c", "a,,b,c=d,,e", "a,", ",", ",,,", "=", "a=b=c",
                           "a,flag", "{not json", "k=v,k=w"}) {
    EXPECT_EQ(OptionValue::parse(text, "type").text(), text);
  }
}

TEST(OptionValueText, Values) {
  OptionValue value = OptionValue::parse("socket,id=a,,b,server,path=/x,path=/y", "backend");
  EXPECT_EQ(value.get("backend"), "socket");
  EXPECT_EQ(value.get("id"), "a,b");
  EXPECT_EQ(value.get("server"), "on");
  EXPECT_EQ(value.get("path"), "/y");
  EXPECT_EQ(value.get("nothing"), std::nullopt);
  value.set("path", "/z");
  value.set("new", "n,m");
  value.remove("server");
  EXPECT_EQ(value.text(), "socket,id=a,,b,path=/z,new=n,,m");
  const OptionValue json = OptionValue::parse(R"({"a":true,"b":{"type":"t"},"c":3})", "");
  EXPECT_EQ(json.get("a"), "on");
  EXPECT_EQ(json.get("b"), "t");
  EXPECT_EQ(json.get("c"), "3");
  OptionValue nested = OptionValue::parse(R"({"a":{"b":{"c":"d"}},"e.f":"g"})", "");
  EXPECT_EQ(nested.get("a.b.c"), "d");
  EXPECT_EQ(nested.get("e.f"), "g");
  EXPECT_EQ(nested.get("a.x"), std::nullopt);
  nested.set("a.b.c", "h");
  EXPECT_EQ(nested.text(), R"({"a":{"b":{"c":"h"}},"e.f":"g"})");
}

}  // namespace
}  // namespace vmsnap
