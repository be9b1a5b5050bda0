// The master key, wrapped by what its users have.
#include "formats/key_slots.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tests/formats/crypto_test.h"

namespace vmsnap {
namespace {

using Slots = nlohmann::json;

constexpr PassphraseCost cheap = {.ops = 1, .memory = 8192};

KeyMaterial material(KeyKind kind, std::string_view text) {
  KeyMaterial result{kind, SecretBytes::create(text.size()).value()};
  std::ranges::copy(bytes_of(text), result.secret.bytes().begin());
  return result;
}

KeyMaterial passphrase(std::string_view text) { return material(KeyKind::passphrase, text); }
KeyMaterial key_file(std::string_view text) { return material(KeyKind::key_file, text); }

class KeySlotsTest : public testing::Test {
 protected:
  KeySlotsTest() {
    slots_.push_back(make_slot(master_, passphrase("one"), cheap).value());
    slots_.push_back(make_slot(master_, passphrase("two"), cheap).value());
    slots_.push_back(make_slot(master_, key_file("three")).value());
  }

  void expect_opens(const KeyMaterial& key) {
    // As it comes from a file.
    const auto opened = unlock(Slots::parse(slots_.dump()), key, "store.json");
    ASSERT_TRUE(opened) << opened.error().message();
    EXPECT_EQ(hex(opened->bytes()), hex(master_.bytes()));
  }
  Error error_of(const Slots& slots, const KeyMaterial& key) {
    const auto opened = unlock(slots, key, "store.json");
    return opened ? Error(ErrorCode::usage, "it opened") : opened.error();
  }

  const SecretKey master_ = test_key(3);
  Slots slots_ = Slots::array();
};

TEST_F(KeySlotsTest, EveryUserGetsTheMasterKey) {
  expect_opens(passphrase("one"));
  expect_opens(passphrase("two"));
  expect_opens(key_file("three"));
}

TEST_F(KeySlotsTest, DefaultCostIsWhatItSays) {
  slots_ = Slots::array({make_slot(master_, passphrase("slow")).value()});
  EXPECT_EQ(slots_[0]["memory"], 256 << 20);
  EXPECT_EQ(slots_[0]["ops"], 3);
  expect_opens(passphrase("slow"));
}

TEST_F(KeySlotsTest, NobodyElseGetsIt) {
  const Error wrong = error_of(slots_, passphrase("One"));
  EXPECT_EQ(wrong.code(), ErrorCode::wrong_key);
  EXPECT_EQ(exit_status(wrong.code()), 16);
  EXPECT_EQ(wrong.message(), "the passphrase is not the one of store.json");
  EXPECT_FALSE(wrong.remedy().empty());
  EXPECT_EQ(error_of(slots_, key_file("three\n")).message(),
            "the key file is not the one of store.json");
  // A passphrase is no key file, also if the bytes are the same.
  EXPECT_EQ(error_of(slots_, key_file("one")).code(), ErrorCode::wrong_key);
  EXPECT_EQ(error_of(slots_, passphrase("three")).code(), ErrorCode::wrong_key);
}

TEST_F(KeySlotsTest, NamesTheKindThatIsWanted) {
  EXPECT_EQ(error_of(Slots::array({slots_[2]}), passphrase("one")).message(),
            "store.json is not encrypted with a passphrase");
  EXPECT_EQ(error_of(Slots::array({slots_[0]}), key_file("one")).remedy(), "Give its passphrase.");
}

TEST_F(KeySlotsTest, ARemovedSlotOpensNothing) {
  slots_.erase(0);
  EXPECT_EQ(error_of(slots_, passphrase("one")).code(), ErrorCode::wrong_key);
  expect_opens(passphrase("two"));
}

TEST_F(KeySlotsTest, SlotsDifferAndHaveNames) {
  const Slots again = make_slot(master_, passphrase("one"), cheap).value();
  std::set<std::string> seen;
  for (const Slots& slot : {slots_[0], slots_[1], again}) {
    const std::string id = slot["id"];
    EXPECT_EQ(id.size(), 8u);
    EXPECT_EQ(id.find_first_not_of("0123456789abcdef"), std::string::npos);
    EXPECT_GT(slot["created_unix_ms"], 1'700'000'000'000);
    for (const char* key : {"id", "salt", "nonce", "sealed"}) {
      EXPECT_TRUE(seen.insert(slot[key].get<std::string>()).second) << key;
    }
  }
}

TEST_F(KeySlotsTest, ChangedSlotsOpenNothing) {
  const Slots other = make_slot(test_key(9), passphrase("other"), cheap).value();
  for (const char* key : {"salt", "nonce", "sealed"}) {
    Slots changed = Slots::array({slots_[0]});
    changed[0][key] = other[key];
    EXPECT_EQ(error_of(changed, passphrase("one")).code(), ErrorCode::wrong_key) << key;
  }
  Slots cheaper = Slots::array({slots_[0]});
  cheaper[0]["ops"] = 2u;
  EXPECT_EQ(error_of(cheaper, passphrase("one")).code(), ErrorCode::wrong_key);
}

TEST_F(KeySlotsTest, WorkIsBounded) {
  for (const auto& [key, value] :
       std::initializer_list<std::pair<const char*, Slots>>{{"ops", 0u},
                                                            {"ops", 101u},
                                                            {"ops", -1},
                                                            {"ops", 1.5},
                                                            {"ops", "1"},
                                                            {"ops", nullptr},
                                                            {"memory", 0u},
                                                            {"memory", 8191u},
                                                            {"memory", (uint64_t{4} << 30) + 1},
                                                            {"memory", ~uint64_t{0}},
                                                            {"memory", -8192},
                                                            {"memory", Slots::array()}}) {
    Slots changed = slots_;
    changed[1][key] = value;
    const Error error = error_of(changed, passphrase("one"));
    EXPECT_EQ(error.code(), ErrorCode::damaged) << key << value;
    EXPECT_EQ(error.message(), "store.json is damaged: its key slot 1 is invalid");
  }
}

TEST_F(KeySlotsTest, GarbageIsDamage) {
  for (const char* text :
       {"null", "1", "\"a\"", "{}", "[]", "[1]", "[null]", "[[]]", "[{}]", R"([{"kind":1}])",
        R"([{"kind":"passphrase"}])", R"({"kind":"passphrase"})"}) {
    EXPECT_EQ(error_of(Slots::parse(text), passphrase("one")).code(), ErrorCode::damaged) << text;
  }
  for (const char* key : {"salt", "nonce", "sealed"}) {
    const std::string good = slots_[0][key];
    for (const Slots& value :
         {Slots(), Slots(1), Slots(""), Slots("A"), Slots("*" + good.substr(1)),
          Slots(good + "AAAA"), Slots(good.substr(4)), Slots(" " + good), Slots(good + "\n")}) {
      Slots changed = slots_;
      changed[0][key] = value;
      EXPECT_EQ(error_of(changed, passphrase("one")).code(), ErrorCode::damaged) << key << value;
      changed[0].erase(key);
      EXPECT_EQ(error_of(changed, passphrase("one")).code(), ErrorCode::damaged) << key;
    }
  }
}

TEST_F(KeySlotsTest, SlotsOfLaterVersionsAreSkipped) {
  slots_.insert(slots_.begin(), Slots{{"kind", "tpm"}, {"sealed", 7}});
  expect_opens(passphrase("two"));
}

TEST_F(KeySlotsTest, NumberOfSlotsIsBounded) {
  while (slots_.size() < max_key_slots) slots_.push_back({{"kind", "tpm"}});
  expect_opens(passphrase("one"));
  slots_.push_back({{"kind", "tpm"}});
  EXPECT_EQ(error_of(slots_, passphrase("one")).message(),
            "store.json is damaged: it has more than 64 key slots");
}

}  // namespace
}  // namespace vmsnap
