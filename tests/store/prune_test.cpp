#include "formats/store/prune.h"

#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

class Pruning : public StoreTest {
 protected:
  PruneReport run(PruneOptions options = {}) {
    options.now_unix_ms = 1'800'000'000'000;
    const auto store = open();
    const auto report = prune(*store, options);
    EXPECT_TRUE(report) << report.error().message();
    return report.value_or(PruneReport());
  }
};

TEST_F(Pruning, FreesWhatNobodyNeedsWhenTheLastUserIsGone) {
  std::string kept;
  {
    const auto store = open();
    const Written first = write(*store, texts(0, 100));
    kept = write(*store, texts(1000, 100), {.vm = "other"}).id;
    ASSERT_TRUE(remove_snapshot(*store, first.id));
    // This very user began before: the pack waits for him.
    EXPECT_EQ(run().packs_waiting, 1u);
    EXPECT_EQ(files_in(store->paths().packs()), 1u);
  }
  const PruneReport report = run();
  EXPECT_EQ(report.packs_deleted, 1u);
  EXPECT_EQ(report.packs_waiting, 0u);
  EXPECT_GT(report.freed_bytes, 0u);
  const auto store = open();
  EXPECT_EQ(files_in(store->paths().condemned()), 0u);
  expect_pages(*store, kept, texts(1000, 100));
}

// A writer has found its pages in a pack that then loses its last snapshot.
TEST_F(Pruning, IsNoDangerToAWriterThatRuns) {
  const auto store = open();
  const std::vector<PageBytes> pages = texts(0, 100);
  const Written first = write(*store, pages);
  ImageInfo info = info_of({pages.size()});
  info.source["name"] = "other";
  auto writer = StoreWriter::begin(*store, info.regions,
                                   {.vm = "other", .domain = {}, .image = {}})
                    .value();
  ImageWriter::Encoder encoder;
  std::vector<uint64_t> numbers(pages.size());
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = i;
  const auto counts = writer->image().write_pages(encoder, numbers, join(pages)).value();
  ASSERT_EQ(counts.stored, 0u);

  ASSERT_TRUE(remove_snapshot(*store, first.id));
  EXPECT_EQ(run().packs_waiting, 1u);
  EXPECT_EQ(run().packs_waiting, 1u);
  EXPECT_EQ(files_in(store->paths().packs()), 0u);
  const std::string id = writer->image().id();
  ASSERT_TRUE(writer->commit(info, some_state(1000), {}));
  writer.reset();
  EXPECT_EQ(files_in(store->paths().packs()), 1u);
  EXPECT_EQ(run().packs_waiting, 0u);
  expect_pages(*store, id, pages);
}

TEST_F(Pruning, KeepsByRuleAndSaysWhy) {
  const auto store = open();
  std::vector<std::string> ids;
  for (int64_t day = 0; day < 5; ++day) {
    ids.push_back(write(*store, texts(0, 3), {}, 1'700'000'000'000 + day * 86'400'000).id);
  }
  PruneOptions options;
  options.keep.emplace().last = 2;
  options.dry_run = true;
  const PruneReport dry = run(options);
  EXPECT_EQ(dry.removed, 3u);
  EXPECT_EQ(dry.decisions[4].decision.reasons, std::vector<std::string>{"last snapshot"});
  EXPECT_EQ(list_snapshots(*store, Where::snapshots)->snapshots.size(), 5u);
  options.dry_run = false;
  EXPECT_EQ(run(options).removed, 3u);
  EXPECT_EQ(list_snapshots(*store, Where::snapshots)->snapshots.size(), 2u);
  ASSERT_TRUE(undelete_snapshot(*store, ids[0]));
  expect_pages(*store, ids[0], texts(0, 3));
}

// Else packs of a snapshot that can still be mended would go.
TEST_F(Pruning, DoesNothingWhereAManifestIsDamaged) {
  const auto store = open();
  const Written first = write(*store, texts(0, 10));
  write(*store, texts(100, 10), {.vm = "other"});
  auto bytes = read_file(store->paths().snapshot(first.id));
  bytes[bytes.size() - 100] ^= std::byte{1};
  write_file(store->paths().snapshot(first.id), bytes);
  EXPECT_EQ(prune(*open(), {}).error().code(), ErrorCode::damaged);
  EXPECT_EQ(files_in(store->paths().packs()), 2u);
  std::filesystem::rename(store->paths().snapshot(first.id),
                          store->paths().quarantine() + "/" + first.id + ".manifest");
  EXPECT_EQ(prune(*open(), {}).error().code(), ErrorCode::damaged);
  EXPECT_EQ(files_in(store->paths().packs()), 2u);
}

TEST_F(Pruning, IsOneAtATime) {
  const auto store = open();
  const StoreLock lock =
      StoreLock::maintain(store->paths(), std::chrono::milliseconds(0)).value();
  EXPECT_EQ(prune(*open(), {}).error().code(), ErrorCode::locked);
}

}  // namespace
}  // namespace vmsnap
