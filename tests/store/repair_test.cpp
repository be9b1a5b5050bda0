#include "formats/damage.h"
#include "formats/image_file.h"
#include "formats/store/store_repair.h"
#include "formats/store/store_verify.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

class RepairingAStore : public StoreTest {
 protected:
  static std::filesystem::path pack_of(const Store& store) {
    return std::filesystem::directory_iterator(store.paths().packs())->path();
  }

  static void flip(const std::string& path, uint64_t offset) {
    auto bytes = read_file(path);
    bytes.at(offset) ^= std::byte{1};
    write_file(path, bytes);
  }

  // Pages that cannot be read; the others must be right.
  static size_t lost_pages(const Store& store, const std::string& id,
                           const std::vector<PageBytes>& pages) {
    const auto reader = store.open_snapshot(id).value();
    size_t lost = 0;
    for (size_t i = 0; i < pages.size(); ++i) {
      PageBytes page;
      const auto read = reader->read_page(i, page);
      if (read) {
        EXPECT_EQ(page, pages[i]) << i;
      } else {
        EXPECT_EQ(read.error().code(), ErrorCode::damaged);
        ++lost;
      }
    }
    return lost;
  }
};

TEST_F(RepairingAStore, LetsNewSnapshotsStoreWhatWasLost) {
  const std::vector<PageBytes> pages = texts(0, 100);
  auto store = open();
  const Written old = write(*store, pages);
  const std::filesystem::path pack = pack_of(*store);
  flip(pack, layout::frames_begin + 20);
  ASSERT_FALSE(verify_store(*store, {}).value().ok());

  const StoreRepairReport report = repair_store(*store, {}).value();
  ASSERT_EQ(report.quarantined_packs.size(), 1u);
  EXPECT_EQ(id_text(report.quarantined_packs[0]), pack.filename().string());
  EXPECT_TRUE(std::filesystem::exists(store->paths().quarantine() + "/" + pack.filename().string()));
  EXPECT_EQ(files_in(store->paths().packs()), 0u);
  EXPECT_EQ(report.indexed_packs, 0u);
  EXPECT_EQ(report.sentences.size(), 2u);

  store = open();
  EXPECT_EQ(lost_pages(*store, old.id, pages), 1u);
  const Written healed = write(*store, pages);
  EXPECT_EQ(healed.counts.stored, 100u);
  expect_pages(*store, healed.id, pages);
  EXPECT_TRUE(verify_store(*store, {.snapshots = {healed.id}}).value().ok());
  // The old one stays damaged, but there is nothing more to put aside.
  const StoreVerifyReport after = verify_store(*store, {}).value();
  EXPECT_FALSE(after.ok());
  EXPECT_FALSE(after.repairable);
  EXPECT_EQ(after.status().error().remedy().find("vmsnap repair"), std::string::npos);
  EXPECT_EQ(repair_store(*store, {}).value().quarantined_packs.size(), 0u);
}

TEST_F(RepairingAStore, FindsDamagedTablesByItself) {
  auto store = open();
  const std::vector<PageBytes> pages = texts(0, 100);
  const Written old = write(*store, pages);
  const std::string pack = pack_of(*store);
  layout::PackTrailer trailer;
  const auto bytes = read_file(pack);
  std::memcpy(&trailer, bytes.data() + bytes.size() - sizeof trailer, sizeof trailer);
  flip(pack, trailer.table_offset + 5);
  EXPECT_EQ(repair_store(*store, {}).value().quarantined_packs.size(), 1u);
  store = open();
  EXPECT_EQ(lost_pages(*store, old.id, pages), 0u);
}

TEST_F(RepairingAStore, DoesNotBelieveTheNotesOfVerify) {
  const auto store = open();
  write(*store, texts(0, 10));
  const std::string notes = fmt::format(R"({{"packs":{{"{}":{{"at":1,"ok":false}}}}}})",
                                        pack_of(*store).filename().string());
  write_file(store->paths().verified(), std::as_bytes(std::span(notes)));
  EXPECT_TRUE(repair_store(*store, {}).value().quarantined_packs.empty());
}

TEST_F(RepairingAStore, MakesTheIndexesAnew) {
  for (const bool sealed : {false, true}) {
    options_.directory = directory_.file(sealed ? "sealed" : "plain");
    if (sealed) seal_store();
    const auto store = open();
    write(*store, texts(0, 100), {.vm = "a"});
    write(*store, texts(0, 100), {.vm = "b", .domain = "tenant"});
    for (const auto& file : std::filesystem::directory_iterator(store->paths().index())) {
      write_file(file.path(), std::as_bytes(std::span("no index at all")));
    }
    const StoreRepairReport report = repair_store(*store, {}).value();
    EXPECT_EQ(report.indexed_packs, 2u);
    EXPECT_EQ(report.indexed_frames, 200u);
    EXPECT_EQ(files_in(store->paths().index()), 4u);
    EXPECT_EQ(write(*store, texts(0, 101), {.vm = "c"}).counts.stored, 1u);
    EXPECT_EQ(write(*store, texts(0, 102), {.vm = "d", .domain = "tenant"}).counts.stored, 2u);
  }
}

TEST_F(RepairingAStore, PutsUnreadableManifestsAside) {
  const auto store = open();
  const Written bad = write(*store, texts(0, 10));
  const Written good = write(*store, texts(0, 20));
  flip(store->paths().snapshot(bad.id), 20);
  const StoreVerifyReport before = verify_store(*store, {}).value();
  ASSERT_EQ(before.unreadable.size(), 1u);
  EXPECT_EQ(before.unreadable[0].id, bad.id);
  EXPECT_TRUE(before.repairable);
  const StoreRepairReport report = repair_store(*store, {}).value();
  EXPECT_EQ(report.quarantined_manifests, std::vector<std::string>{bad.id});
  EXPECT_TRUE(std::filesystem::exists(store->paths().quarantine() + "/" + bad.id + ".manifest"));
  EXPECT_TRUE(verify_store(*store, {}).value().ok());
  expect_pages(*store, good.id, texts(0, 20));
}

TEST_F(RepairingAStore, TellsOfMissingPacksAndGoesOn) {
  const auto store = open();
  write(*store, texts(0, 10));
  std::filesystem::remove(pack_of(*store));
  write(*store, texts(50, 10), {.vm = "other"});
  const StoreRepairReport report = repair_store(*store, {}).value();
  EXPECT_EQ(report.missing_packs.size(), 1u);
  EXPECT_EQ(report.indexed_packs, 1u);
}

TEST_F(RepairingAStore, WhatCannotBeLookedForIsNotMissing) {
  const auto store = open();
  const Written written = write(*store, texts(0, 10));
  const std::string pack = pack_of(*store);
  const auto reader = store->open_snapshot(written.id).value();
  PageBytes page;
  std::filesystem::rename(pack, pack + ".away");
  std::filesystem::create_symlink(pack, pack);  // ELOOP, also for root
  const auto unread = reader->read_page(0, page);
  ASSERT_FALSE(unread);
  EXPECT_FALSE(is_lasting(unread.error())) << unread.error().message();
  EXPECT_EQ(verify_store(*store, {}).error().os_errno(), ELOOP);
  EXPECT_EQ(repair_store(*store, {}).error().os_errno(), ELOOP);
  std::filesystem::remove(pack);
  const auto lost = reader->read_page(0, page);
  ASSERT_FALSE(lost);
  EXPECT_TRUE(is_lasting(lost.error())) << lost.error().message();
  std::filesystem::rename(pack + ".away", pack);
  EXPECT_TRUE(reader->read_page(0, page));
  EXPECT_TRUE(verify_store(*store, {}).value().ok());
}

TEST_F(RepairingAStore, IsOneAtATime) {
  const auto store = open();
  const StoreLock lock = StoreLock::maintain(store->paths(), {}).value();
  EXPECT_EQ(repair_store(*store, {}).error().code(), ErrorCode::locked);
}

}  // namespace
}  // namespace vmsnap
