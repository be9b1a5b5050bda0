#include "formats/store/prune.h"

#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <set>

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

// Two VMs whose QEMUs have the same name, and one whose QEMU has none and so is
// called by its process: what a backup calls them keeps them apart, and together.
TEST_F(Pruning, KeepsEachByWhatABackupCallsIt) {
  const auto store = open();
  for (int64_t day = 0; day < 2; ++day) {
    const int64_t at = 1'700'000'000'000 + day * 86'400'000;
    for (const char* name : {"web", "db"}) {
      write(*store, texts(0, 3), {.backup_name = name, .vm = "guest"}, at);
    }
    write(*store, texts(0, 3), {.backup_name = "mail", .vm = fmt::format("qemu-{}", day)}, at);
    write(*store, texts(0, 3), {.vm = "byhand"}, at);
  }
  PruneOptions options;
  options.keep.emplace().last = 1;
  options.dry_run = true;
  EXPECT_EQ(run(options).removed, 4u);
  options.vm = "mail";
  EXPECT_EQ(run(options).removed, 1u);
  options.vm = "guest";  // both of them, each by itself
  EXPECT_EQ(run(options).removed, 2u);
  options.vm = "qemu-0";
  EXPECT_EQ(run(options).removed, 0u);
  options.vm = "typo";
  const auto none = prune(*open(), options);
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().code(), ErrorCode::usage);
  options.vm = "";
  options.dry_run = false;
  EXPECT_EQ(run(options).removed, 4u);
  std::set<std::string> left;
  const SnapshotList list = list_snapshots(*store, Where::snapshots).value();
  for (const SnapshotEntry& entry : list.snapshots) {
    EXPECT_EQ(entry.info.created_unix_ms, 1'700'086'400'000);
    left.insert(entry.group());
  }
  EXPECT_EQ(left, (std::set<std::string>{"byhand", "db", "mail", "web"}));
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

  // One snapshot that needs an eighth of each of two packs, and one that is dead.
  void two_packs_and_a_dead_one() {
    const auto store = open();
    std::vector<std::string> gone;
    for (const uint64_t number : {0, 10'000, 20'000}) {
      gone.push_back(write(*store, texts(number, 400)).id);
    }
    second_ = texts(30'000, 400);
    for (size_t i = 0; i < second_.size(); i += 8) {
      second_[i] = text_page(i);
      second_[i + 1] = text_page(10'000 + i);
    }
    ids_ = {write(*store, second_).id};
    const auto reader = store->open_snapshot(ids_[0]).value();
    last_of_first_ = reader->location(392).value();
    for (const std::string& id : gone) ASSERT_TRUE(remove_snapshot(*store, id));
  }

  // Where the first of these packs is, of which page 392 is the last one.
  std::string first_pack() {
    return StorePaths{options_.directory}.pack(last_of_first_.file);
  }

  // As a prune that cannot read the first pack leaves it.
  void expect_all_but_the_first_pack_went() {
    const PageLocation stays = last_of_first_;
    const PruneReport report = run();
    EXPECT_EQ(report.repacked.packs, 1u);
    EXPECT_EQ(report.repacked.manifests, 1u);
    EXPECT_EQ(report.packs_deleted, 2u);  // the dead one, and the one that was moved
    const auto store = open();
    EXPECT_EQ(files_in(store->paths().packs()), 3u);
    EXPECT_EQ(files_in(store->paths().temporary()), 0u);
    const auto reader = store->open_snapshot(ids_[0]).value();
    EXPECT_EQ(reader->location(0).value().file, stays.file);
    EXPECT_NE(reader->location(1).value().file, stays.file);
    for (size_t i = 0; i < second_.size(); ++i) {
      PageBytes page;
      const auto kind = reader->read_page(i, page);
      if (i != 392) ASSERT_TRUE(kind) << kind.error().message();
      if (kind) EXPECT_EQ(page, second_[i]) << "page " << i;
    }
  }

  PageLocation last_of_first_;
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

// Also where not all fits into one batch: the rest has its turn in the same prune.
TEST_P(Repacking, TakesOneBatchAfterAnother) {
  two_packs_and_a_dead_one();
  const auto store = open();
  const auto in_trash = manifest_ids(store->paths().trash());
  for (const std::string& id : *in_trash) {
    std::filesystem::remove(store->paths().in_trash(id));
  }
  RepackOptions options;
  options.batch_bytes = 1;
  RepackReport report;
  int batches = 0;
  {
    const StoreLock lock = StoreLock::maintain(store->paths(), {}).value();
    const Status repacked = repack(*store, options, report, [&] {
      ++batches;
      return Status();
    });
    ASSERT_TRUE(repacked) << repacked.error().message();
  }
  EXPECT_EQ(report.packs, 2u);
  EXPECT_EQ(batches, 2);
  expect_pages(*store, ids_[0], second_);
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

TEST_P(Repacking, LeavesAPackWithADamagedFrame) {
  two_packs_and_a_dead_one();
  auto bytes = read_file(first_pack());
  bytes[last_of_first_.offset + 30] ^= std::byte{1};
  write_file(first_pack(), bytes);
  expect_all_but_the_first_pack_went();
  EXPECT_EQ(verify_store(*open(), {})->damaged_packs.size(), 1u);
}

TEST_P(Repacking, LeavesAPackThatCannotBeOpened) {
  two_packs_and_a_dead_one();
  auto bytes = read_file(first_pack());
  bytes[bytes.size() - 1] ^= std::byte{1};  // its trailer's checksum
  write_file(first_pack(), bytes);
  expect_all_but_the_first_pack_went();
}

TEST_P(Repacking, LeavesAPackInQuarantine) {
  two_packs_and_a_dead_one();
  const StorePaths paths = {options_.directory};
  std::filesystem::rename(first_pack(), paths.quarantine() + "/" + id_text(last_of_first_.file));
  const PruneReport report = run();
  EXPECT_EQ(report.repacked.packs, 1u);
  EXPECT_EQ(report.packs_deleted, 2u);
  expect_pages(*open(), ids_[0], second_);
}

// Also if what is lost of it is nowhere.
TEST_P(Repacking, LeavesAPackThatIsMissing) {
  two_packs_and_a_dead_one();
  std::filesystem::remove(first_pack());
  const PruneReport report = run();
  EXPECT_EQ(report.repacked.packs, 1u);
  EXPECT_EQ(report.packs_deleted, 2u);
  PageBytes page;
  const auto store = open();
  const auto reader = store->open_snapshot(ids_[0]).value();
  EXPECT_FALSE(reader->read_page(0, page));
  EXPECT_TRUE(reader->read_page(1, page));
}

// A limit for files is as good as a full disk: both are ErrorCode::no_space.
TEST_P(Repacking, WithoutSpaceFreesWhatIsDead) {
  two_packs_and_a_dead_one();
  const auto before = std::signal(SIGXFSZ, SIG_IGN);
  rlimit old = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  const rlimit small = {.rlim_cur = layout::block_size, .rlim_max = old.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto full = prune(*open(), {});
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, before);
  ASSERT_TRUE(full) << full.error().message();
  EXPECT_EQ(full->packs_deleted, 1u);
  EXPECT_EQ(full->repacked.packs, 0u);
  EXPECT_EQ(files_in(StorePaths{options_.directory}.temporary()), 0u);
  expect_pages(*open(), ids_[0], second_);
  EXPECT_EQ(run().packs_deleted, 2u);
  expect_pages(*open(), ids_[0], second_);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Repacking, ::testing::Bool(),
                         [](const auto& sealed) { return sealed.param ? "sealed" : "plain"; });

}  // namespace
}  // namespace vmsnap
