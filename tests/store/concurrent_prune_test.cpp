// Prune, beside who takes snapshots away himself.
#include <chrono>
#include <filesystem>
#include <thread>

#include "formats/store/prune.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

class ConcurrentPrune : public StoreTest {};

TEST_F(ConcurrentPrune, GoesOnIfASnapshotWasRemovedMeanwhile) {
  for (const bool empty_trash : {false, true}) {
    options_.directory = directory_.file(empty_trash ? "emptied" : "store");
    const auto store = open();
    const StorePaths& paths = store->paths();
    std::vector<std::string> ids;
    for (uint64_t i = 0; i < 4; ++i) {
      ids.push_back(write(*store, texts(10 * i, 3), {}, static_cast<int64_t>(1000 * i)).id);
    }
    PruneOptions options;
    options.keep.emplace().last = 1;
    options.empty_trash = empty_trash;
    options.now_unix_ms = 1'800'000'000'000;
    // Prune removes this when it has decided; then it waits for the commit.
    const std::string abandoned = paths.temporary() + "/.x.vmsnap-0123456789abcdef";
    write_file(abandoned, {});
    Result<PruneReport> report = fail(ErrorCode::io, "did not run");
    std::thread pruning;
    {
      const StoreLock commit = StoreLock::commit(paths).value();
      pruning = std::thread([&] { report = prune(*open(), options); });
      while (std::filesystem::exists(abandoned)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      std::filesystem::rename(paths.snapshot(ids[1]), paths.in_trash(ids[1]));
    }
    pruning.join();
    ASSERT_TRUE(report) << report.error().message();
    EXPECT_EQ(report->kept, 1u);
    EXPECT_EQ(report->removed, 2u);
    EXPECT_EQ(manifest_ids(paths.snapshots()).value(), std::vector<std::string>{ids[3]});
    // Else it may have gone already with what was in the trash before.
    EXPECT_LE(report->deleted, empty_trash ? 3u : 1u);
    EXPECT_EQ(report->deleted + manifest_ids(paths.trash()).value().size(), 3u);
  }
}

}  // namespace
}  // namespace vmsnap
