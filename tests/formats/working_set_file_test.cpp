#include "formats/working_set_file.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <numeric>

#include "formats/checked_block.h"
#include "formats/file.h"

namespace vmsnap::testing {
namespace {

class WorkingSetFileTest : public ::testing::Test {
 protected:
  using Pages = std::vector<uint64_t>;

  Result<Pages> decode(std::span<const std::byte> bytes) const {
    return decode_working_set(bytes, image_, 1000, "f");
  }
  std::string error_of(std::span<const std::byte> bytes) const {
    const auto pages = decode(bytes);
    return pages ? "no error" : pages.error().message();
  }
  // A file whose header was changed, with the checksum made right.
  template <class Change>
  std::vector<std::byte> with_header(Change change) const {
    std::vector<std::byte> bytes = encode_working_set(image_, Pages{1, 2});
    layout::WorkingSetHeader header;
    std::memcpy(&header, bytes.data(), sizeof header);
    change(header);
    header.checksum = block_checksum(header);
    std::memcpy(bytes.data(), &header, sizeof header);
    return bytes;
  }

  const layout::ImageId image_ = {1, 2, 3};
};

TEST_F(WorkingSetFileTest, ComesBackInItsOrder) {
  for (const Pages& pages : {Pages{}, Pages{999}, Pages{5, 3, 999, 0}}) {
    const auto decoded = decode(encode_working_set(image_, pages));
    ASSERT_TRUE(decoded) << decoded.error().message();
    EXPECT_EQ(*decoded, pages);
  }
}

TEST_F(WorkingSetFileTest, IsReplacedAsAWhole) {
  const std::string path = ::testing::TempDir() + "vmsnap-working-set";
  ASSERT_TRUE(write_working_set(path, image_, Pages{1, 2, 3}));
  ASSERT_TRUE(write_working_set(path, image_, Pages{9}));
  EXPECT_EQ(*read_working_set(path, image_, 1000), Pages{9});
  EXPECT_EQ(std::filesystem::file_size(path), 72u);
  std::filesystem::remove(path);
  EXPECT_EQ(read_working_set(path, image_, 1000).error().os_errno(), ENOENT);
}

TEST_F(WorkingSetFileTest, HoldsSoManyPagesAndNoMore) {
  Pages pages(layout::working_set_max_pages + 1);
  std::iota(pages.begin(), pages.end(), 0);
  const auto decoded = decode_working_set(encode_working_set(image_, pages), image_, 1 << 21, "f");
  ASSERT_TRUE(decoded) << decoded.error().message();
  EXPECT_EQ(decoded->size(), layout::working_set_max_pages);
}

TEST_F(WorkingSetFileTest, EveryChangedBitIsFound) {
  const std::vector<std::byte> good = encode_working_set(image_, Pages{5, 3});
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::vector<std::byte> bytes = good;
    bytes[bit / 8] ^= std::byte{1} << bit % 8;
    EXPECT_FALSE(decode(bytes)) << "bit " << bit;
  }
  for (size_t length = 0; length < good.size(); ++length) {
    EXPECT_FALSE(decode(std::span(good).first(length))) << length;
  }
}

TEST_F(WorkingSetFileTest, SaysWhatIsWrong) {
  EXPECT_EQ(error_of({}), "f cannot be used: it is cut short");
  EXPECT_EQ(error_of(std::vector<std::byte>(64)), "f cannot be used: it is no working set");
  EXPECT_EQ(error_of(with_header([](auto& header) { header.version = 2; })),
            "f has version 2; this program reads version 1");
  EXPECT_EQ(error_of(with_header([](auto& header) { header.image[15] = 1; })),
            "f cannot be used: it belongs to another image");
  EXPECT_EQ(error_of(with_header([](auto& header) { header.reserved[7] = 1; })),
            "f cannot be used: its header is not what it must be");
  EXPECT_EQ(error_of(with_header([](auto& header) { header.count = (uint64_t{1} << 61) + 2; })),
            "f cannot be used: its length is wrong");
  EXPECT_EQ(error_of(with_header([](auto& header) { header.pages_checksum ^= 1; })),
            "f cannot be used: the checksum of its pages is wrong");
  EXPECT_EQ(error_of(encode_working_set(image_, Pages{5, 1000})),
            "f cannot be used: it names page 1000 of 1000");
  EXPECT_EQ(error_of(encode_working_set(image_, Pages{5, 6, 5})),
            "f cannot be used: it names a page twice");
}

}  // namespace
}  // namespace vmsnap::testing
