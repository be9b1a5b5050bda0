#include "formats/store/store_diff.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

class DiffOfSnapshots : public StoreTest {};

TEST_F(DiffOfSnapshots, ListsWhatDiffersAndReadsLittle) {
  const auto store = open();
  std::vector<PageBytes> pages = texts(0, 1000);
  pages[700] = zero_page();
  const Written a = write(*store, pages);
  for (const size_t page : {3, 4, 5, 700, 999}) pages[page] = text_page(5000 + page);
  pages[20] = zero_page();
  const Written b = write(*store, pages);
  const SnapshotDiff diff = diff_snapshots(*store, a.id, b.id).value();
  EXPECT_EQ(diff.differing_pages, 6u);
  EXPECT_EQ(diff.pages_read, 6u);
  EXPECT_FALSE(diff.same());
  ASSERT_EQ(diff.regions.size(), 1u);
  EXPECT_EQ(diff.regions[0].name, "region0");
  EXPECT_EQ(diff.regions[0].common_pages, 1000u);
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (const auto& range : diff.regions[0].differing) {
    ranges.emplace_back(range.offset / page_size, range.length / page_size);
  }
  EXPECT_EQ(ranges, (std::vector<std::pair<uint64_t, uint64_t>>{{3, 3}, {20, 1}, {700, 1}, {999, 1}}));
  EXPECT_TRUE(diff_snapshots(*store, a.id, a.id).value().same());
}

// The same bytes in other packs, because domains share nothing.
TEST_F(DiffOfSnapshots, ComparesBytesNotPlaces) {
  const auto store = open();
  std::vector<PageBytes> pages = texts(0, 100);
  const Written a = write(*store, pages, {.domain = "x"});
  pages.push_back(text_page(200));
  const Written b = write(*store, pages, {.domain = "y"});
  const SnapshotDiff diff = diff_snapshots(*store, a.id, b.id).value();
  EXPECT_EQ(diff.pages_read, 100u);
  EXPECT_EQ(diff.differing_pages, 0u);
  EXPECT_EQ(diff.only_a_pages, 0u);
  EXPECT_EQ(diff.only_b_pages, 1u);
  EXPECT_EQ(diff_snapshots(*store, b.id, a.id).value().only_a_pages, 1u);
}

// Pack numbers are a manifest's own: here the same number is another pack.
TEST_F(DiffOfSnapshots, TellsPacksApartByTheirIds) {
  const auto store = open();
  const Written a = write(*store, texts(0, 50), {.vm = "a"});
  const Written b = write(*store, texts(100, 50), {.vm = "b"});
  EXPECT_EQ(diff_snapshots(*store, a.id, b.id).value().differing_pages, 50u);
}

TEST_F(DiffOfSnapshots, MatchesRegionsByName) {
  const auto store = open();
  const auto write_regions = [&](const std::string& first, const std::string& second,
                                 const std::vector<PageBytes>& pages) {
    ImageInfo info = info_of({10, 20});
    info.regions[0].name = first;
    info.regions[1].name = second;
    auto writer = StoreWriter::begin(*store, info.regions, {.vm = "vm"}).value();
    ImageWriter::Encoder encoder;
    std::vector<uint64_t> numbers(pages.size());
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = i;
    EXPECT_TRUE(writer->image().write_pages(encoder, numbers, join(pages)));
    const std::string id = writer->image().id();
    EXPECT_TRUE(writer->commit(info, {}, {}));
    return id;
  };
  const std::string a = write_regions("ram", "rom", texts(0, 30));
  const std::string b = write_regions("rom", "vga", texts(10, 30));
  const SnapshotDiff diff = diff_snapshots(*store, a, b).value();
  // a's rom is pages 10..29, b's 10..19: the ten that b has are the same.
  ASSERT_EQ(diff.regions.size(), 3u);
  EXPECT_EQ(diff.regions[0].name, "ram");
  EXPECT_EQ(diff.regions[0].only_a_pages, 10u);
  EXPECT_FALSE(diff.regions[0].in_b);
  EXPECT_EQ(diff.regions[1].name, "rom");
  EXPECT_EQ(diff.regions[1].common_pages, 10u);
  EXPECT_EQ(diff.regions[1].only_a_pages, 10u);
  EXPECT_EQ(diff.regions[2].name, "vga");
  EXPECT_EQ(diff.regions[2].only_b_pages, 20u);
  EXPECT_EQ(diff.differing_pages, 0u);
}

TEST_F(DiffOfSnapshots, FailsForWhatItCannotCompare) {
  const auto store = open();
  const Written a = write(*store, texts(0, 50), {.vm = "a"});
  const Written b = write(*store, texts(100, 50), {.vm = "b"});
  const auto pack = std::filesystem::directory_iterator(store->paths().packs())->path();
  auto bytes = read_file(pack);
  bytes[4096 + 30] ^= std::byte{1};
  write_file(pack, bytes);
  EXPECT_EQ(diff_snapshots(*store, a.id, b.id).error().code(), ErrorCode::damaged);
  EXPECT_TRUE(diff_snapshots(*store, a.id, a.id).value().same());
}

}  // namespace
}  // namespace vmsnap
