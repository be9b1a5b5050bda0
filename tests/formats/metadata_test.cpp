// The metadata document: what is accepted, and what is not.
#include "formats/metadata.h"

#include <gtest/gtest.h>

#include <string_view>

#include "formats/image_layout.h"

namespace vmsnap {
namespace {

constexpr const char* valid_id = "00112233445566778899aabbccddeeff";

nlohmann::json valid_document() {
  return {{"id", valid_id},
          {"created_unix_ms", 1732140700123},
          {"regions",
           {{{"name", "pc.ram"}, {"address", 0}, {"length", 8192}},
            {{"name", "rom"}, {"address", nullptr}, {"length", 4096}}}},
          {"source", {{"kind", "qemu"}}}};
}

Result<ImageInfo> decode(std::string_view json, uint64_t pages = 3) {
  return decode_metadata(std::as_bytes(std::span(json)), pages, "a.img");
}

Result<ImageInfo> decode(const nlohmann::json& json, uint64_t pages = 3) {
  return decode(std::string_view(json.dump()), pages);
}

void expect_damaged(const Result<ImageInfo>& info, std::string_view why) {
  ASSERT_FALSE(info) << why;
  EXPECT_EQ(info.error().code(), ErrorCode::damaged);
  EXPECT_NE(info.error().message().find(why), std::string::npos) << info.error().message();
}

TEST(Metadata, Valid) {
  const ImageInfo info = decode(valid_document()).value();
  EXPECT_EQ(info.id, valid_id);
  EXPECT_EQ(info.created_unix_ms, 1732140700123);
  ASSERT_EQ(info.regions.size(), 2u);
  EXPECT_EQ(info.regions[0].name, "pc.ram");
  EXPECT_EQ(info.regions[1].address, ~uint64_t{0});
  EXPECT_EQ(info.regions[1].first_page, 2u);
  EXPECT_EQ(info.source["kind"], "qemu");
}

TEST(Metadata, UnknownKeysAreIgnored) {
  nlohmann::json json = valid_document();
  json["later"] = {1, 2};
  json["regions"][0]["numa"] = 3;
  EXPECT_TRUE(decode(json));
}

TEST(Metadata, EncodeAndDecodeAgree) {
  const ImageInfo info = decode(valid_document()).value();
  const std::string json = encode_metadata(info, 3, "a.img").value();
  EXPECT_EQ(nlohmann::json::parse(json), valid_document());
}

TEST(Metadata, EveryKeyIsNeeded) {
  for (const char* key : {"id", "created_unix_ms", "regions", "source"}) {
    nlohmann::json json = valid_document();
    json.erase(key);
    expect_damaged(decode(json), key);
    json[key] = true;
    expect_damaged(decode(json), key);
  }
  for (const char* key : {"name", "address", "length"}) {
    nlohmann::json json = valid_document();
    json["regions"][1].erase(key);
    expect_damaged(decode(json), "a region lacks a proper name, address or length");
    json["regions"][1][key] = -1.5;
    expect_damaged(decode(json), "a region lacks a proper name, address or length");
  }
}

TEST(Metadata, Bounds) {
  nlohmann::json json = valid_document();
  json["id"] = "00112233445566778899AABBCCDDEEFF";
  expect_damaged(decode(json), "32 hexadecimal digits");
  json = valid_document();
  json["created_unix_ms"] = max_created_unix_ms + 1;
  expect_damaged(decode(json), "out of range");
  json["created_unix_ms"] = -1;
  expect_damaged(decode(json), "out of range");
  for (const uint64_t length : {uint64_t{0}, uint64_t{4097}, uint64_t{4096}, ~uint64_t{4095}}) {
    json = valid_document();
    json["regions"][0]["length"] = length;
    expect_damaged(decode(json), "region");
  }
  json = valid_document();
  json["regions"][0]["name"] = std::string(256, 'x');
  expect_damaged(decode(json), "longer than 255 bytes");
  for (const char* name : {"a\nb", "a\x1b[2J",
                           "a\xc2\x9b"
                           "2J",
                           "\x7f"}) {
    json["regions"][0]["name"] = name;
    expect_damaged(decode(json), "control character");
  }
  json["regions"][0]["name"] = "Größe";
  EXPECT_TRUE(decode(json));
  expect_damaged(decode(valid_document(), 4), "do not add up to 4 pages");
  json = valid_document();
  json["regions"] = nlohmann::json::array();
  for (size_t i = 0; i <= max_regions; ++i) {
    json["regions"].push_back({{"name", ""}, {"address", 0}, {"length", 4096}});
  }
  expect_damaged(decode(json, max_regions + 1), "more than 65536 regions");
}

TEST(Metadata, NotJson) {
  for (const char* text : {"", "{", "nul", "[1,2]", "\"\xff\"", "{}x", "1e999", "{\"id\":1e999}"}) {
    EXPECT_FALSE(decode(std::string_view(text))) << text;
  }
  expect_damaged(decode(std::string_view("{")), "its metadata is not JSON");
}

TEST(Metadata, NestingIsBounded) {
  nlohmann::json json = valid_document();
  json["source"]["deep"] = nlohmann::json::parse(std::string(62, '[') + std::string(62, ']'));
  EXPECT_TRUE(decode(json));
  json["source"]["deep"] = nlohmann::json::parse(std::string(63, '[') + std::string(63, ']'));
  expect_damaged(decode(json), "nested too deep");
  json["source"]["deep"] = "\\\"" + std::string(100, '[');  // in a string it is text
  EXPECT_TRUE(decode(json));
  expect_damaged(decode(std::string_view(std::string(1 << 20, '['))), "nested too deep");
  const std::string large(layout::max_metadata + 1, ' ');
  expect_damaged(decode(std::string_view(large)), "more than 16 MiB");
}

TEST(Metadata, EncodeRefusesWhatDecodeWould) {
  ImageInfo info = decode(valid_document()).value();
  info.regions[0].length = 1;
  const auto json = encode_metadata(info, 3, "a.img");
  ASSERT_FALSE(json);
  EXPECT_EQ(json.error().code(), ErrorCode::io);
}

// What the user gives is looked at before anything is done, by the same rules.
TEST(Metadata, CheckTagsRefusesWhatDecodeWould) {
  const auto agree = [](const std::vector<std::string>& tags, const std::string& domain) {
    ImageInfo info = decode(valid_document()).value();
    info.tags = tags;
    info.domain = domain;
    const Status checked = check_tags(tags, domain);
    EXPECT_EQ(checked.has_value(), encode_metadata(info, 3, "a.img").has_value());
    if (!checked) EXPECT_EQ(checked.error().code(), ErrorCode::usage);
    return checked.has_value();
  };
  const std::string longest(max_tag_bytes, 'x');
  EXPECT_TRUE(agree({}, ""));
  EXPECT_TRUE(agree({"a", longest}, longest));
  EXPECT_TRUE(agree(std::vector<std::string>(max_tags, "a"), ""));
  EXPECT_FALSE(agree(std::vector<std::string>(max_tags + 1, "a"), ""));
  EXPECT_FALSE(agree({"a", ""}, ""));
  EXPECT_FALSE(agree({longest + "x"}, ""));
  EXPECT_FALSE(agree({"a"}, longest + "x"));
  EXPECT_FALSE(agree({"a\nb"}, ""));
  EXPECT_FALSE(agree({}, "a\x1b"));
  EXPECT_FALSE(agree({std::string(100, '\xff')}, ""));  // each becomes three bytes
  EXPECT_TRUE(agree({std::string(85, '\xff')}, ""));
}

TEST(Metadata, TextThatIsNotUtf8IsReplaced) {
  ImageInfo info = decode(valid_document()).value();
  info.source["argument"] =
      "a\xff"
      "b";
  const std::string json = encode_metadata(info, 3, "a.img").value();
  EXPECT_EQ(decode(std::string_view(json)).value().source["argument"],
            "a\xef\xbf\xbd"
            "b");
}

}  // namespace
}  // namespace vmsnap
