// What fails on the disk must not cost more than what fails.
#include <filesystem>

#include "formats/store/prune.h"
#include "formats/store/store_repair.h"
#include "tests/store/faulty_disk.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

class AFaultyDisk : public StoreTest {
 protected:
  // A snapshot that stays, and a pack that no manifest needs.
  void leave_a_dead_pack() {
    const auto store = open();
    write(*store, texts(0, 10));
    const std::string gone = write(*store, texts(100, 10), {.vm = "gone"}).id;
    std::filesystem::remove(store->paths().snapshot(gone));
  }

  size_t packs() const { return files_in(options_.directory + "/packs"); }
};

// A manifest that waits there for somebody to mend it may need any pack.
TEST_F(AFaultyDisk, ThatDoesNotListTheQuarantineKeepsPruneFromDeleting) {
  leave_a_dead_pack();
  FaultyDisk disk;
  disk.fail_listing(options_.directory + "/quarantine", 0);
  const auto pruned = prune(*open(), {});
  ASSERT_FALSE(pruned);
  EXPECT_EQ(pruned.error().os_errno(), EIO);
  EXPECT_EQ(packs(), 2u);
}

TEST_F(AFaultyDisk, ThatMadeTheQuarantineAFileKeepsPruneFromDeleting) {
  leave_a_dead_pack();
  const std::string quarantine = options_.directory + "/quarantine";
  std::filesystem::remove(quarantine);
  write_file(quarantine, {});
  const auto pruned = prune(*open(), {});
  ASSERT_FALSE(pruned);
  EXPECT_EQ(pruned.error().os_errno(), ENOTDIR);
  EXPECT_EQ(packs(), 2u);
  // One that is not there has nothing in it.
  std::filesystem::remove(quarantine);
  EXPECT_TRUE(prune(*open(), {}));
  EXPECT_EQ(packs(), 1u);
}

TEST_F(AFaultyDisk, ThatDoesNotListTheIndexIsAnErrorOfRepair) {
  const auto store = open();
  write(*store, texts(0, 10));
  for (const int names : {0, 1, 2, 3}) {
    FaultyDisk disk;
    disk.fail_listing(store->paths().index(), names);
    const auto repaired = repair_store(*store, {});
    ASSERT_FALSE(repaired);
    EXPECT_EQ(repaired.error().os_errno(), EIO);
  }
  EXPECT_TRUE(repair_store(*store, {}));
}

// Else a crash brings old manifests back that need the packs: those of a prune
// that was killed before it synced what it had renamed, say.
TEST_F(AFaultyDisk, ThatDoesNotKeepManifestsKeepsPruneFromDeletingPacks) {
  for (const char* directory : {"/snapshots", "/trash"}) {
    leave_a_dead_pack();
    const size_t before = packs();
    FaultyDisk disk;
    disk.fail_sync(options_.directory + directory);
    const auto pruned = prune(*open(), {});
    ASSERT_FALSE(pruned) << directory;
    EXPECT_EQ(pruned.error().os_errno(), EIO);
    EXPECT_EQ(packs(), before);
    EXPECT_EQ(files_in(options_.directory + "/condemned"), 0u);
  }
  FaultyDisk disk;
  EXPECT_TRUE(prune(*open(), {}));
  EXPECT_TRUE(disk.was_synced(options_.directory + "/snapshots"));
  EXPECT_TRUE(disk.was_synced(options_.directory + "/trash"));
  EXPECT_EQ(packs(), 1u);
}

TEST_F(AFaultyDisk, KeepsANewStoreAlsoIfItsNameEndsInSlashes) {
  for (const char* slashes : {"", "/", "//"}) {
    const std::string directory = directory_.file(fmt::format("new{}", std::strlen(slashes)));
    options_.directory = directory + slashes;
    FaultyDisk disk;
    EXPECT_EQ(open()->paths().root, directory);
    EXPECT_TRUE(disk.was_synced(directory_.path())) << options_.directory;
  }
  EXPECT_EQ(StorePaths{"/"}.root, "/");
  EXPECT_EQ(StorePaths{"//"}.root, "/");
  EXPECT_EQ(StorePaths{"a/b/"}.root, "a/b");
}

}  // namespace
}  // namespace vmsnap
