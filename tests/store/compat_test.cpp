// Images and stores of every version that there ever was are read as they were
// written; tests/compat has one of each.
#include <filesystem>

#include "formats/store/store_verify.h"
#include "formats/verify.h"
#include "tests/formats/similar_page.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

const std::string compat = VMSNAP_SOURCE_DIR "/tests/compat";

std::vector<PageBytes> pages_of_compat(uint64_t changed = 0) {
  std::vector<PageBytes> pages;
  for (uint64_t i = 0; i < 8; ++i) pages.push_back(text_page(i + changed));
  pages.push_back(zero_page());
  pages.push_back(random_page(7));
  pages.push_back(text_page(3));
  return pages;
}

class OfVersion1 : public StoreTest {
 protected:
  void copy_store(const std::string& name) {
    // Git keeps no empty folders; using a store writes to it.
    std::filesystem::copy(compat + "/" + name, options_.directory,
                          std::filesystem::copy_options::recursive);
    for (const char* folder : {"snapshots", "trash", "packs", "condemned", "quarantine", "index", "tmp"}) {
      std::filesystem::create_directories(options_.directory + "/" + folder);
    }
  }
  void read_store(const std::string& name) {
    copy_store(name);
    const auto store = Store::open(options_).value();
    const SnapshotList list = list_snapshots(*store, Where::snapshots).value();
    ASSERT_EQ(list.snapshots.size(), 2u);
    EXPECT_EQ(list.snapshots[0].info.created_unix_ms, 1'000);
    EXPECT_EQ(list.snapshots[1].vm(), "vm");
    expect_pages(*store, list.snapshots[0].id, pages_of_compat());
    expect_pages(*store, list.snapshots[1].id, pages_of_compat(100));
    EXPECT_TRUE(verify_store(*store, {}).value().ok());
    EXPECT_EQ(write(*store, pages_of_compat(100)).counts.stored, 0u);
  }
};

void expect_image(const std::string& name, const std::vector<PageBytes>& pages) {
  const std::string path = compat + "/" + name;
  EXPECT_TRUE(verify_image(path)->ok());
  const auto image = ImageReader::open(path).value();
  ASSERT_EQ(image->page_count(), pages.size());
  for (size_t i = 0; i < pages.size(); ++i) {
    PageBytes page;
    ASSERT_TRUE(image->read_page(i, page));
    EXPECT_EQ(page, pages[i]);
  }
  EXPECT_EQ(image->device_state().value(), some_state(300));
}

TEST_F(OfVersion1, AnImage) { expect_image("image-v1.img", pages_of_compat()); }

TEST_F(OfVersion1, AStore) { read_store("store-v1"); }

TEST_F(OfVersion1, AnEncryptedStore) {
  seal_store("the key of the compatibility data");
  read_store("store-v1-sealed");
}

std::vector<PageBytes> pages_of_deltas() {
  std::vector<PageBytes> pages;
  for (uint64_t member = 0; member < 6; ++member) pages.push_back(similar_page(3, member));
  pages.push_back(zero_page());
  pages.push_back(text_page(1));
  return pages;
}

class WithDeltas : public OfVersion1 {};

TEST_F(WithDeltas, AnImageOfVersion1) { expect_image("image-v1-deltas.img", pages_of_deltas()); }

TEST_F(WithDeltas, AStoreWithAPackOfVersion2) {
  copy_store("store-v1-pack-v2");
  const auto store = Store::open(options_).value();
  const SnapshotList list = list_snapshots(*store, Where::snapshots).value();
  ASSERT_EQ(list.snapshots.size(), 1u);
  expect_pages(*store, list.snapshots[0].id, pages_of_deltas());
  EXPECT_TRUE(verify_store(*store, {}).value().ok());
  EXPECT_EQ(write(*store, pages_of_deltas()).counts.stored, 0u);
}

}  // namespace
}  // namespace vmsnap
