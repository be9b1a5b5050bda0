#include "formats/store/prune.h"

#include <filesystem>

#include "formats/store/recorded_working_set.h"
#include "formats/store/store_verify.h"
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

TEST_F(Pruning, RemovesWorkingSetsOfSnapshotsThatAreGone) {
  const auto store = open();
  const std::string kept = write(*store, texts(0, 10)).id;
  const std::string trashed = write(*store, texts(100, 10)).id;
  const std::string gone = write(*store, texts(200, 10)).id;
  const StorePaths& paths = store->paths();
  EXPECT_FALSE(std::filesystem::exists(paths.working_sets()));
  for (const std::string& id : {kept, trashed, gone}) {
    const auto image = store->open_snapshot(id).value();
    ASSERT_EQ(working_set_path(*image), paths.working_set(id));
    ASSERT_TRUE(save_working_set(*image, std::vector<uint64_t>{7, 3}));
    EXPECT_EQ(best_working_set(*image).value(), (std::vector<uint64_t>{7, 3}));
  }
  ASSERT_TRUE(remove_snapshot(*store, gone));
  EXPECT_EQ(run().deleted, 1u);
  ASSERT_TRUE(remove_snapshot(*store, trashed));
  EXPECT_TRUE(std::filesystem::exists(paths.working_set(kept)));
  EXPECT_TRUE(std::filesystem::exists(paths.working_set(trashed)));
  EXPECT_FALSE(std::filesystem::exists(paths.working_set(gone)));
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

// Nights of which each changes a little; the first ones go. What is left of
// their packs moves.
class Repacking : public Pruning, public ::testing::WithParamInterface<bool> {
 protected:
  void SetUp() override {
    if (GetParam()) seal_store();
  }

  // `pages` of 400, of which every fourth is kept by the second night.
  void two_nights() {
    const auto store = open();
    first_ = texts(0, 400);
    second_ = texts(5000, 400);
    for (size_t i = 0; i < second_.size(); i += 4) second_[i] = first_[i];
    const std::vector<uint64_t> working_set = {5, 7};
    ids_ = {write(*store, first_).id, write(*store, second_, {}, 1'732'140'800'000, working_set).id};
    other_ = write(*store, texts(9000, 10), {.vm = "x", .domain = "other"}).id;
    ASSERT_TRUE(remove_snapshot(*store, ids_[0]));
  }

  std::vector<PageBytes> first_, second_;
  std::vector<std::string> ids_;
  std::string other_;
};

TEST_P(Repacking, FreesWhatIsNotNeededOfAPack) {
  two_nights();
  EXPECT_EQ(run().repacked.manifests, 1u);
  run();
  const auto store = open();
  EXPECT_EQ(files_in(store->paths().condemned()), 0u);
  EXPECT_EQ(files_in(store->paths().temporary()), 0u);
  expect_pages(*store, ids_[1], second_);
  expect_pages(*store, other_, texts(9000, 10));
  EXPECT_EQ((*store->open_snapshot(ids_[1]))->working_set().value(), (std::vector<uint64_t>{5, 7}));
  const auto verified = verify_store(*store, {});
  ASSERT_TRUE(verified) << verified.error().message();
  EXPECT_TRUE(verified->ok());
  // And what was moved is found again by its content.
  const Written again = write(*store, second_, {.vm = "new"});
  EXPECT_EQ(again.counts.stored, 0u);
}

TEST_P(Repacking, IsSaidAndDoneOnce) {
  two_nights();
  uint64_t repacked = 0;
  for (int i = 0; i < 3; ++i) repacked += run().repacked.packs;
  EXPECT_EQ(repacked, 1u);
  PruneOptions options;
  options.dry_run = true;
  EXPECT_EQ(run(options).repacked.packs, 0u);
}

TEST_P(Repacking, LeavesAloneWhatItIsToldTo) {
  two_nights();
  PruneOptions never;
  never.repack_below = 0;
  for (int i = 0; i < 3; ++i) EXPECT_EQ(run(never).repacked.packs, 0u);
  PruneOptions dry;
  dry.dry_run = true;
  const PruneReport report = run(dry);
  EXPECT_EQ(report.repacked.packs, 1u);
  EXPECT_LT(report.repacked.needed_bytes, report.repacked.bytes / 2);
  // A VM is being restored from it.
  const auto store = open();
  const auto reader = store->open_snapshot(ids_[1]).value();
  EXPECT_EQ(run().repacked.packs, 0u);
  expect_pages(*store, ids_[1], second_);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Repacking, ::testing::Bool(),
                         [](const auto& sealed) { return sealed.param ? "sealed" : "plain"; });

}  // namespace
}  // namespace vmsnap
