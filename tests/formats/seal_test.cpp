// Keys, digests and sealed pieces, against answers of other implementations:
// Python's hashlib (BLAKE2b), RFC 8439 written out in Python and checked with
// the RFC's own example, and the SipHash paper's example.
#include "formats/seal.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "formats/digest.h"
#include "tests/formats/crypto_test.h"

namespace vmsnap {
namespace {

std::string hex_of(const SecretKey& key) { return hex(key.bytes()); }

TEST(SecretKey, RandomKeysDiffer) {
  EXPECT_NE(hex_of(SecretKey::random().value()), hex_of(SecretKey::random().value()));
}

TEST(SecretKey, MovesItsBytes) {
  SecretKey key = test_key();
  const uint8_t* const where = key.bytes().data();
  SecretKey moved = std::move(key);
  EXPECT_EQ(moved.bytes().data(), where);
  moved = test_key(7);
  EXPECT_EQ(hex_of(moved), hex(counting_bytes<32>(7)));
}

TEST(SecretKey, DerivedKeysAreKnown) {
  const SecretKey key = test_key();
  const auto id = counting_bytes<16>();
  EXPECT_EQ(hex_of(key.derive("manifest", id)),
            "a3928e75bbd8442f4a474c4c4cae5baa8e2f709c0c36550ded5c540355695131");
  EXPECT_EQ(hex_of(key.derive("hash", id)),
            "21321ffc774020db645afca0b41651dbd32bf74258efb03d719825e28e02bac8");
  EXPECT_NE(hex_of(key.derive("hash", counting_bytes<16>(1))), hex_of(key.derive("hash", id)));
  EXPECT_NE(hex_of(test_key(1).derive("hash", id)), hex_of(key.derive("hash", id)));
}

TEST(SecretBytes, ShrinkWipesTheRest) {
  SecretBytes secret = SecretBytes::create(8).value();
  const std::span<std::byte> all = secret.bytes();
  std::ranges::fill(all, std::byte{7});
  secret.shrink(3);
  EXPECT_EQ(hex(secret.bytes()), "070707");
  EXPECT_EQ(hex(all), "0707070000000000");
  secret.shrink(5);
  EXPECT_EQ(secret.size(), 3u);
}

TEST(KeyedHash, IsSipHash) {
  const auto message = counting_bytes<15>();
  EXPECT_EQ(keyed_hash64(test_key(), std::as_bytes(std::span(message))), 0xa129ca6149be45e5);
  EXPECT_NE(keyed_hash64(test_key(), {}), keyed_hash64(test_key(1), {}));
}

TEST(Digest, IsBlake2b256) {
  EXPECT_EQ(hex(digest(bytes_of("abc"))),
            "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
  EXPECT_EQ(hex(digest({})), "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8");
}

TEST(Digest, StreamIsTheSame) {
  DigestStream stream;
  stream.add({});
  stream.add(bytes_of("a"));
  stream.add(bytes_of("bc"));
  EXPECT_EQ(stream.finish(), digest(bytes_of("abc")));
  EXPECT_EQ(DigestStream().finish(), digest({}));
}

class SealTest : public testing::Test {
 protected:
  static constexpr uint64_t place = 0x0102030405060708;
  static constexpr std::string_view text = "sixteen bytes...and some more";

  SealTest() : bytes_(bytes_of(text).begin(), bytes_of(text).end()) {
    seal(key_, place, bytes_of("prelude"), bytes_, tag_);
  }

  SecretKey key_ = test_key();
  std::vector<std::byte> bytes_;
  std::array<std::byte, seal_tag_size> tag_;
};

TEST_F(SealTest, KnownAnswer) {
  EXPECT_EQ(hex(bytes_), "8320d590ce5c843806d25ea900564f96816896e4fb2b28fb7758c82f8c");
  EXPECT_EQ(hex(tag_), "e57579c4e56751639b0443651481a7a2");
}

TEST_F(SealTest, ComesBack) {
  ASSERT_TRUE(unseal(key_, place, bytes_of("prelude"), bytes_, tag_));
  EXPECT_TRUE(std::ranges::equal(bytes_, bytes_of(text)));
}

TEST_F(SealTest, AnyChangeIsFound) {
  std::vector<std::byte> copy = bytes_;
  EXPECT_FALSE(unseal(test_key(1), place, bytes_of("prelude"), copy, tag_));
  EXPECT_EQ(copy, std::vector<std::byte>(copy.size()));  // nothing that is not authentic leaks
  copy = bytes_;
  EXPECT_FALSE(unseal(key_, place + 1, bytes_of("prelude"), copy, tag_));
  copy = bytes_;
  EXPECT_FALSE(unseal(key_, place, bytes_of("Prelude"), copy, tag_));
  copy = bytes_;
  EXPECT_FALSE(unseal(key_, place, bytes_of("prelude"), std::span(copy).first(28), tag_));
  for (size_t bit = 0; bit < bytes_.size() * 8; ++bit) {
    copy = bytes_;
    copy[bit / 8] ^= std::byte(1 << bit % 8);
    ASSERT_FALSE(unseal(key_, place, bytes_of("prelude"), copy, tag_)) << bit;
  }
  for (size_t bit = 0; bit < tag_.size() * 8; ++bit) {
    copy = bytes_;
    auto tag = tag_;
    tag[bit / 8] ^= std::byte(1 << bit % 8);
    ASSERT_FALSE(unseal(key_, place, bytes_of("prelude"), copy, tag)) << bit;
  }
}

TEST_F(SealTest, NothingCanBeSealedToo) {
  seal(key_, 0, {}, {}, tag_);
  EXPECT_TRUE(unseal(key_, 0, {}, {}, tag_));
  EXPECT_FALSE(unseal(key_, 1, {}, {}, tag_));
}

}  // namespace
}  // namespace vmsnap
