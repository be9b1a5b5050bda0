// Who opens a snapshot, beside who replaces or deletes its manifest.
#include <atomic>
#include <filesystem>
#include <thread>

#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

class Claiming : public StoreTest {
 protected:
  std::unique_ptr<Store> store_ = open();
  const std::vector<PageBytes> pages_ = texts(0, 10);
  const std::string id_ = write(*store_, pages_).id;
  const std::string path_ = store_->paths().snapshot(id_);
};

TEST_F(Claiming, IsNotPossibleWhileItIsOpen) {
  EXPECT_TRUE(claim_manifest(path_));
  auto reader = store_->open_snapshot(id_).value();
  EXPECT_TRUE(manifest_in_use(path_));
  EXPECT_FALSE(claim_manifest(path_));
  const auto another = store_->open_snapshot(id_);
  EXPECT_TRUE(another);
  reader.reset();
  EXPECT_TRUE(manifest_in_use(path_));
}

TEST_F(Claiming, IsNotHinderedByWhoOnlyAsks) {
  std::atomic<bool> end = false;
  std::thread asking([&] {
    while (!end) manifest_in_use(path_);
  });
  int failed = 0;
  for (int i = 0; i < 5000; ++i) failed += claim_manifest(path_) ? 0 : 1;
  end = true;
  asking.join();
  EXPECT_EQ(failed, 0);
}

// What repack does. The reader must not end up with a lock on the old file,
// which keeps nobody from the new one.
TEST_F(Claiming, MakesAReaderTakeTheSuccessor) {
  for (int round = 0; round < 100; ++round) {
    const std::string successor = path_ + ".new";
    std::filesystem::copy_file(path_, successor);
    Fd claim = claim_manifest(path_);
    ASSERT_TRUE(claim);
    Result<std::unique_ptr<ImageReader>> reader = fail(ErrorCode::io, "not opened");
    std::atomic<bool> begun = false;
    std::thread reading([&] {
      begun = true;
      reader = store_->open_snapshot(id_);
    });
    while (!begun) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(20 * (round % 10)));
    std::filesystem::rename(successor, path_);
    claim.reset();
    reading.join();
    ASSERT_TRUE(reader) << reader.error().message();
    ASSERT_TRUE(manifest_in_use(path_)) << "round " << round;
  }
}

TEST_F(Claiming, OfWhatIsDeletedMakesAReaderSayThatItIsGone) {
  ASSERT_TRUE(claim_manifest(path_));
  std::filesystem::remove(path_);
  EXPECT_FALSE(claim_manifest(path_));
  const auto reader = store_->open_snapshot(id_);
  ASSERT_FALSE(reader);
  EXPECT_EQ(reader.error().os_errno(), ENOENT);
}

// A writer goes on for a while when its snapshot is there: it fills the index.
TEST_F(Claiming, IsNotWhatAWriterDoesThatHasCommitted) {
  const std::string path = directory_.file("new");
  AtomicFile file = AtomicFile::create(path, /*replace=*/false).value();
  ASSERT_TRUE(file.commit());
  EXPECT_FALSE(manifest_in_use(path));
}

}  // namespace
}  // namespace vmsnap
