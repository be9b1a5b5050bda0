// Delta frames in packs.
#include <algorithm>
#include <set>
#include <thread>

#include "formats/page_entry.h"
#include "formats/store/copy_image.h"
#include "formats/store/pack_file.h"
#include "formats/store/prune.h"
#include "formats/store/store_verify.h"
#include "formats/verify.h"
#include "tests/formats/similar_page.h"
#include "tests/store/pack_forge.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

// 40 pages that are like one of 4.
std::vector<PageBytes> herd(uint64_t first_family) {
  std::vector<PageBytes> pages;
  for (uint64_t i = 0; i < 40; ++i) pages.push_back(similar_page(first_family + i % 4, 1 + i / 4));
  return pages;
}

std::vector<PageBytes> all_of(const std::vector<std::vector<PageBytes>>& parts) {
  std::vector<PageBytes> pages;
  for (const auto& part : parts) pages.insert(pages.end(), part.begin(), part.end());
  return pages;
}

class DeltaPacks : public StoreTest, public testing::WithParamInterface<bool> {
 protected:
  void SetUp() override {
    if (GetParam()) seal_store();
  }
  StoreWriter::Options with_deltas(uint64_t pack_bytes = 0) const {
    StoreWriter::Options options;
    options.image.deltas = true;
    options.pack_bytes = pack_bytes;
    return options;
  }
  // All packs that are there, by a version.
  size_t packs_with_deltas(const Store& store) const {
    size_t count = 0;
    const std::vector<std::string> names = manifest_ids(store.paths().packs()).value();
    for (const std::string& name : names) {
      layout::ImageId id;
      EXPECT_TRUE(parse_id(name, id));
      count += PackFile::open(store.paths().pack(id), id, store.master()).value()->may_have_deltas();
    }
    return count;
  }
  std::string only_pack(const Store& store) const {
    EXPECT_EQ(files_in(store.paths().packs()), 1u);
    return std::filesystem::directory_iterator(store.paths().packs())->path().string();
  }
  void expect_whole(const Store& store) {
    const auto report = verify_store(store, {});
    ASSERT_TRUE(report) << report.error().message();
    EXPECT_TRUE(report->ok()) << report->status().error().message();
  }
};

TEST_P(DeltaPacks, AreSmallerAndReadBack) {
  const auto store = open();
  std::vector<PageBytes> pages;
  for (uint64_t i = 0; i < 8; ++i) pages = all_of({pages, herd(i * 4)});
  // A batch of 256 pages is never parted, so that the second is in a new pack.
  const Written small = write(*store, pages, with_deltas(64 << 10));
  EXPECT_LT(small.added_bytes, pages.size() * page_size / 3);
  EXPECT_EQ(files_in(store->paths().packs()), 2u);
  EXPECT_EQ(packs_with_deltas(*store), 2u);
  expect_pages(*store, small.id, pages);
  expect_whole(*store);
  // They are known, like any others.
  EXPECT_EQ(write(*store, pages).counts.stored, 0u);
  EXPECT_EQ(write(*store, pages, {.vm = "other"}).counts.stored, 0u);
  // Without, packs are as they were.
  write(*store, herd(100));
  EXPECT_EQ(packs_with_deltas(*store), 2u);
}

// Another thread may fill the pack of a base while its delta is being made.
TEST_P(DeltaPacks, HaveTheirBasesThemselves) {
  const auto store = open();
  std::vector<PageBytes> pages;
  for (uint64_t i = 0; i < 400; ++i) pages.push_back(similar_page(i % 4, 1 + i / 4));
  ImageInfo info = info_of({pages.size()});
  info.source["name"] = "vm";
  auto writer = StoreWriter::begin(*store, info.regions, with_deltas(20 << 10)).value();
  std::vector<std::thread> threads;
  for (uint64_t first = 0; first < 4; ++first) {
    threads.emplace_back([&, first] {
      ImageWriter::Encoder encoder;
      for (uint64_t i = first; i < pages.size(); i += 4) {
        ASSERT_TRUE(writer->image().write_pages(encoder, std::vector{i}, pages[i]));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::string id = writer->image().id();
  ASSERT_TRUE(writer->commit(info, some_state(1000), {}));
  writer.reset();
  EXPECT_GT(files_in(store->paths().packs()), 1u);
  expect_pages(*store, id, pages);
  expect_whole(*store);
}

TEST_P(DeltaPacks, RemainDeltasWhenTheyAreRepacked) {
  std::string kept;
  const std::vector<PageBytes> pages = herd(0);
  {
    const auto store = open();
    std::vector<PageBytes> many = pages;
    for (uint64_t i = 0; i < 100; ++i) many.push_back(random_page(1000 + i));
    const Written both = write(*store, many, with_deltas());
    kept = write(*store, pages, {.vm = "other"}).id;
    ASSERT_TRUE(remove_snapshot(*store, both.id));
  }
  PruneOptions options;
  options.empty_trash = true;
  options.repack_below = 0.5;
  options.now_unix_ms = 1'800'000'000'000;
  const auto report = prune(*open(), options);
  ASSERT_TRUE(report) << report.error().message();
  EXPECT_EQ(report->repacked.packs, 1u);
  ASSERT_TRUE(prune(*open(), options));
  const auto store = open();
  EXPECT_EQ(files_in(store->paths().packs()), 1u);
  EXPECT_EQ(packs_with_deltas(*store), 1u);
  uint64_t bytes = 0;
  for (const auto& file : std::filesystem::directory_iterator(store->paths().packs())) {
    bytes += file.file_size();
  }
  EXPECT_LT(bytes, pages.size() * page_size / 2);
  expect_pages(*store, kept, pages);
  expect_whole(*store);
}

TEST_P(DeltaPacks, GoThroughExportAndImport) {
  const auto store = open();
  const std::vector<PageBytes> pages = herd(0);
  const std::string id = write(*store, pages, with_deltas()).id;
  const std::string alone = directory_.file("alone.img"), small = directory_.file("small.img");
  const auto snapshot = store->open_snapshot(id).value();
  const uint64_t alone_bytes = copy_image(*snapshot, alone, false, /*deltas=*/false).value();
  const uint64_t small_bytes = copy_image(*snapshot, small, false, /*deltas=*/true).value();
  EXPECT_LT(small_bytes, alone_bytes / 2);
  EXPECT_TRUE(verify_image(small)->ok());
  options_.directory = directory_.file("second");
  const auto second = open();
  const Imported imported =
      import_image(*second, *ImageReader::open(small).value(), "", {}, /*deltas=*/true).value();
  EXPECT_LT(imported.added_bytes, alone_bytes / 2);
  expect_pages(*second, imported.id, pages);
}

// What verify says of a frame, it says of those that it is the base of.
TEST_P(DeltaPacks, ALostBaseLosesItsDeltas) {
  const auto store = open();
  write(*store, herd(0), with_deltas());
  auto bytes = read_file(only_pack(*store));
  bytes[layout::frames_begin + 100] ^= std::byte{1};
  write_file(only_pack(*store), bytes);
  const StoreVerifyReport report = verify_store(*store, {}).value();
  ASSERT_EQ(report.damaged_snapshots.size(), 1u);
  EXPECT_EQ(report.damaged_snapshots[0].report.damaged_pages, 10u);  // of one family
}

// Somebody changed a base and made its checksum right, but not the digest.
TEST_P(DeltaPacks, ADoubtfulBaseMakesItsDeltasDoubtful) {
  if (GetParam()) return;  // who can do that has the key
  const auto store = open();
  ImageInfo info = info_of({11});
  info.source["name"] = "vm";
  const auto writer = StoreWriter::begin(*store, info.regions, with_deltas()).value();
  ImageWriter::Encoder encoder;
  for (uint64_t i = 0; i < 11; ++i) {  // a segment each
    const PageBytes page = i < 10 ? similar_page(0, 1 + i) : random_page(9);
    ASSERT_TRUE(writer->image().write_pages(encoder, std::vector{i}, page));
  }
  ASSERT_TRUE(writer->commit(info, some_state(1000), {}));
  auto bytes = read_file(only_pack(*store));
  const PackForge pack(bytes);
  const auto frame = std::span(bytes).subspan(layout::frames_begin);
  frame[100] ^= std::byte{1};
  FrameEncoder().finish(frame, {.offset = layout::frames_begin,
                                .seed = layout::image_seed(pack.get<layout::PackHeader>(0).id)});
  write_file(only_pack(*store), bytes);
  const StoreVerifyReport report = verify_store(*store, {}).value();
  ASSERT_EQ(report.damaged_snapshots.size(), 1u);
  EXPECT_EQ(report.damaged_snapshots[0].report.damaged_pages, 10u);
}

INSTANTIATE_TEST_SUITE_P(Sealed, DeltaPacks, testing::Bool());

}  // namespace
}  // namespace vmsnap
