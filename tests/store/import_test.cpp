// Images through a pipe into a store.
#include <filesystem>

#include "formats/store/copy_image.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

class Importing : public StoreTest, public ::testing::WithParamInterface<bool> {
 protected:
  void SetUp() override {
    if (GetParam()) seal_store();
    pages_ = texts(0, 300);
    for (uint64_t i = 0; i < 20; ++i) pages_[i] = random_page(i);  // stored as they are
    for (size_t i = 20; i < 40; ++i) {
      pages_[i] = pages_[i - 20];
      pages_[i][100] ^= std::byte{1};  // a delta, where there are any
    }
    write_image(image_, pages_, {pages_.size()}, some_state(1000));
  }

  const std::string image_ = directory_.file("a.img");
  std::vector<PageBytes> pages_;
};

// What is in the unnamed file of this process below `directory`.
std::string unnamed_content(const std::string& directory) {
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code error;
    const std::string target = std::filesystem::read_symlink(entry.path(), error).string();
    if (error || !target.starts_with(directory) || !target.ends_with(" (deleted)")) continue;
    const auto bytes = read_file(entry.path());
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  return {};
}

TEST_P(Importing, TakesWhatComesAndShowsNoneOfIt) {
  const auto store = open();
  const std::string deltas = directory_.file("deltas.img");
  ASSERT_TRUE(copy_image(*ImageReader::open(image_).value(), deltas, false, /*deltas=*/true));
  for (const std::string& path : {image_, deltas}) {
    const Fd fd = open_file(path, O_RDONLY).value();
    const auto image = open_spooled(fd.get(), *store);
    ASSERT_TRUE(image) << image.error().message();
    const std::string spooled = unnamed_content(store->paths().temporary());
    EXPECT_GE(spooled.size(), std::filesystem::file_size(path));
    const std::string page(reinterpret_cast<const char*>(pages_[3].data()), 64);
    EXPECT_EQ(spooled.find(page) == std::string::npos, GetParam());
    EXPECT_EQ(spooled.find("region0") == std::string::npos, GetParam());
    const auto imported = import_image(*store, **image, "", {"a tag"}, false);
    ASSERT_TRUE(imported) << imported.error().message();
    expect_pages(*store, imported->id, pages_);
  }
  EXPECT_EQ(files_in(store->paths().temporary()), 0u);
}

TEST_P(Importing, RefusesWhatIsNoImage) {
  const auto store = open();
  const Fd text = open_file(directory_.file("text"), O_RDWR | O_CREAT).value();
  EXPECT_EQ(open_spooled(text.get(), *store).error().code(), ErrorCode::damaged);
  const Fd manifest =
      open_file(StoreTest::open()->paths().snapshot(write(*store, texts(0, 3)).id), O_RDONLY).value();
  EXPECT_EQ(open_spooled(manifest.get(), *store).error().code(),
            GetParam() ? ErrorCode::damaged : ErrorCode::usage);
}

TEST_P(Importing, HasNoRoomForMoreTagsThanAnImageHas) {
  const auto store = open();
  const auto image = ImageReader::open(image_).value();
  const auto imported = import_image(*store, *image, "", std::vector<std::string>(65, "a"), false);
  ASSERT_FALSE(imported);
  EXPECT_EQ(imported.error().code(), ErrorCode::usage);
  EXPECT_EQ(files_in(store->paths().packs()), 0u);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Importing, ::testing::Bool(),
                         [](const auto& sealed) { return sealed.param ? "sealed" : "plain"; });

}  // namespace
}  // namespace vmsnap
