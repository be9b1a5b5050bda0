#include <sys/resource.h>
#include <sys/stat.h>

#include <random>
#include <set>
#include <thread>

#include "formats/page_entry.h"
#include "formats/page_store.h"
#include "formats/verify.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

class SnapshotsInAStore : public StoreTest {};

TEST_F(SnapshotsInAStore, ReadBackByteForByte) {
  std::vector<PageBytes> pages = texts(0, 700);
  pages[3] = zero_page();
  pages[600] = random_page(1);
  const auto store = open();
  const Written first = write(*store, pages);
  EXPECT_EQ(first.counts.stored, 699u);
  expect_pages(*store, first.id, pages);
  struct stat status;
  ASSERT_EQ(::stat(options_.directory.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0700u);
  EXPECT_EQ(files_in(store->paths().temporary()), 0u);
}

TEST_F(SnapshotsInAStore, CostWhatChanged) {
  std::vector<PageBytes> pages = texts(0, 1000);
  const auto store = open();
  const Written first = write(*store, pages);
  pages[17] = text_page(5000);
  const Written second = write(*store, pages);
  EXPECT_EQ(second.counts.stored, 1u);
  // A moved page is found by its content; one of another VM, too.
  std::swap(pages[1], pages[900]);
  EXPECT_EQ(write(*store, pages).counts.stored, 0u);
  EXPECT_EQ(write(*store, pages, {.vm = "other"}).counts.stored, 0u);
  // Each is complete in itself: the first goes, the second is all there.
  std::filesystem::remove(store->paths().snapshot(first.id));
  pages = texts(0, 1000);
  pages[17] = text_page(5000);
  expect_pages(*store, second.id, pages);
}

TEST_F(SnapshotsInAStore, ShareNothingAcrossDomains) {
  const std::vector<PageBytes> pages = texts(0, 100);
  const auto store = open();
  write(*store, pages);
  EXPECT_EQ(write(*store, pages, {.vm = "vm", .domain = "tenant"}).counts.stored, 100u);
  EXPECT_EQ(write(*store, pages, {.vm = "b", .domain = "tenant"}).counts.stored, 0u);
}

// Whatever the hash says: bytes are compared before anything is shared.
TEST_F(SnapshotsInAStore, AreNotFooledByCollidingHashes) {
  const auto collide = [](std::span<const std::byte>) -> uint64_t { return 42; };
  const std::vector<PageBytes> ours = texts(0, 300);
  const std::vector<PageBytes> theirs = texts(1000, 300);
  const auto store = open();
  const Written a = write(*store, ours, {.vm = "a", .image = {.hash = collide}});
  const Written b = write(*store, theirs, {.vm = "b", .image = {.hash = collide}});
  expect_pages(*store, a.id, ours);
  expect_pages(*store, b.id, theirs);
  EXPECT_GE(b.counts.stored, 290u);
  // The hash was asked, after all: the newest page that has it is found.
  write(*store, {random_page(1)}, {.vm = "c", .image = {.hash = collide}});
  EXPECT_EQ(write(*store, {random_page(1)}, {.vm = "d", .image = {.hash = collide}}).counts.stored,
            0u);
}

TEST_F(SnapshotsInAStore, OfSeveralPacks) {
  std::vector<PageBytes> pages;
  for (uint64_t i = 0; i < 600; ++i) pages.push_back(random_page(i));
  const auto store = open();
  const Written first = write(*store, pages, {.pack_bytes = 1 << 20});
  EXPECT_GE(files_in(store->paths().packs()), 2u);
  expect_pages(*store, first.id, pages);
  EXPECT_EQ(write(*store, pages).counts.stored, 0u);
}

// A reader must not need a descriptor for each pack: out of them, it would read
// nothing at all.
TEST_F(SnapshotsInAStore, OfMorePacksThanDescriptors) {
  constexpr size_t packs = 40;
  std::vector<PageBytes> pages;
  for (uint64_t i = 0; i < packs * PageStore::max_batch; ++i) pages.push_back(random_page(i));
  const auto store = open();
  const Written written = write(*store, pages, {.pack_bytes = 1});
  ASSERT_GE(files_in(store->paths().packs()), packs);
  rlimit before = {};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit few = {.rlim_cur = packs, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  expect_pages(*store, written.id, pages);
  expect_pages(*store, written.id, pages);  // what was closed is opened again
  EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
}

TEST_F(SnapshotsInAStore, KeepTheWorkingSet) {
  const auto store = open();
  const std::vector<uint64_t> order = {5, 3, 9};
  const Written first = write(*store, texts(0, 10), {}, 1, order);
  EXPECT_EQ(store->open_snapshot(first.id).value()->working_set().value(), order);
}

TEST_F(SnapshotsInAStore, AreFoundByTheBeginningOfTheirIdAndByAge) {
  const auto store = open();
  const Written old = write(*store, texts(0, 3), {.vm = "a"}, 1000);
  const Written newer = write(*store, texts(0, 3), {.vm = "b"}, 2000);
  EXPECT_EQ(resolve_snapshot(*store, Where::snapshots, "latest").value(), newer.id);
  EXPECT_EQ(resolve_snapshot(*store, Where::snapshots, "latest", "a").value(), old.id);
  EXPECT_EQ(resolve_snapshot(*store, Where::snapshots, old.id.substr(0, 12)).value(), old.id);
  EXPECT_FALSE(resolve_snapshot(*store, Where::snapshots, ""));
  EXPECT_FALSE(resolve_snapshot(*store, Where::snapshots, "latest", "c"));
  EXPECT_FALSE(resolve_snapshot(*store, Where::snapshots, "xyz"));
  const SnapshotList list = list_snapshots(*store, Where::snapshots).value();
  ASSERT_EQ(list.snapshots.size(), 2u);
  EXPECT_EQ(list.snapshots[0].vm(), "a");
  EXPECT_EQ(list.snapshots[0].zero_pages, 0u);
}

// However old a store is, a region of RAM is in few packs.
TEST_F(SnapshotsInAStore, StayNearEachOther) {
  const auto store = open();
  std::vector<PageBytes> pages = texts(0, 1024);
  std::mt19937_64 random(1);
  std::string last;
  for (uint64_t night = 0; night < 60; ++night) {
    for (int i = 0; i < 30; ++i) pages[random() % pages.size()] = text_page(10000 + random() % 100000);
    last = write(*store, pages, {}, static_cast<int64_t>(night + 1)).id;
  }
  expect_pages(*store, last, pages);
  std::set<uint64_t> in_leaf[2];
  ASSERT_TRUE(visit_entries(store->open_manifest(store->paths().snapshot(last)).value(),
                            [&](uint64_t page, uint64_t entry) -> Status {
                              in_leaf[page / 512].insert(PageEntry::from_bits(entry).pack);
                              return {};
                            }));
  EXPECT_GT(in_leaf[0].size(), 4u);  // or this would say nothing
  EXPECT_LE(in_leaf[0].size(), KnownSnapshots::max_packs + 1);
  EXPECT_LE(in_leaf[1].size(), KnownSnapshots::max_packs + 1);
}

TEST_F(SnapshotsInAStore, DoNotNeedTheIndex) {
  const auto store = open();
  const std::vector<PageBytes> pages = texts(0, 50);
  write(*store, pages);
  for (const auto& file : std::filesystem::directory_iterator(store->paths().index())) {
    write_file(file.path(), std::as_bytes(std::span("no index at all")));
  }
  const Written other = write(*store, pages, {.vm = "other"});
  EXPECT_EQ(other.counts.stored, 50u);
  expect_pages(*store, other.id, pages);
  EXPECT_EQ(write(*store, pages, {.vm = "third"}).counts.stored, 0u);
}

// Also where the VM has another name each time, as one without has.
TEST_F(SnapshotsInAStore, FollowThoseThatABackupCallsTheSame) {
  const auto store = open();
  const std::vector<PageBytes> pages = texts(0, 50);
  write(*store, pages, {.backup_name = "web", .vm = "qemu-1"});
  std::filesystem::remove_all(store->paths().index());
  std::filesystem::create_directory(store->paths().index());
  EXPECT_EQ(write(*store, pages, {.backup_name = "web", .vm = "qemu-2"}).counts.stored, 0u);
  std::filesystem::remove_all(store->paths().index());
  std::filesystem::create_directory(store->paths().index());
  EXPECT_EQ(write(*store, pages, {.backup_name = "new", .vm = "qemu-2"}).counts.stored, 0u);
}

// Its frames are elsewhere: that is no damage.
TEST_F(SnapshotsInAStore, AreNoImageFiles) {
  const auto store = open();
  const std::string path = store->paths().snapshot(write(*store, texts(0, 3)).id);
  EXPECT_EQ(ImageReader::open(path).error().code(), ErrorCode::usage);
  EXPECT_EQ(verify_image(path).error().code(), ErrorCode::usage);
}

class ASealedStore : public StoreTest {};

TEST_F(ASealedStore, ShowsNothingOfWhatItHolds) {
  seal_store();
  const auto store = open();
  std::vector<PageBytes> pages = texts(0, 600);
  for (uint64_t i = 0; i < 20; ++i) pages[i] = random_page(i);  // stored as they are
  const Written first = write(*store, pages, {.vm = "a telling name"});
  expect_pages(*store, first.id, pages);
  EXPECT_EQ(write(*store, pages).counts.stored, 0u);

  std::string all;
  for (const auto& file : std::filesystem::recursive_directory_iterator(options_.directory)) {
    if (!file.is_regular_file()) continue;
    const auto bytes = read_file(file.path());
    all.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  const auto holds = [&](std::span<const std::byte> bytes) {
    return all.find(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size())) !=
           std::string::npos;
  };
  EXPECT_FALSE(holds(std::span(pages[3]).first(32)));
  EXPECT_EQ(all.find("telling name"), std::string::npos);
  EXPECT_EQ(all.find("region0"), std::string::npos);
}

TEST_F(ASealedStore, OpensWithItsKeyOnly) {
  seal_store();
  const Written first = write(*open(), texts(0, 3));
  const StoreOptions right = options_;
  options_.key = {};
  EXPECT_EQ(Store::open(options_).error().code(), ErrorCode::wrong_key);
  seal_store("another secret");
  EXPECT_EQ(Store::open(options_).error().code(), ErrorCode::wrong_key);
  seal_store();
  expect_pages(*Store::open(right).value(), first.id, texts(0, 3));
}

// Else the next snapshots would go in without a key, and unsealed.
// What a descriptor gives, it gives once, also to who makes the store.
TEST_F(ASealedStore, IsMadeWithAPassphraseOfADescriptor) {
  const auto give = [&](const std::string& line) {
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    const Fd writing(ends[1]);
    ASSERT_EQ(::write(writing.get(), line.data(), line.size()), static_cast<ssize_t>(line.size()));
    options_.key = {.passphrase_fd = ends[0]};
  };
  for (const char* line : {"a secret\n", "a secret\nanother line\n"}) {
    give(line);
    const auto opened = Store::open_or_create(options_);
    EXPECT_TRUE(opened) << opened.error().message();
    ::close(*options_.key.passphrase_fd);
  }
  give("no secret\n");
  EXPECT_EQ(Store::open_or_create(options_).error().code(), ErrorCode::wrong_key);
}

TEST_F(ASealedStore, NoticesThatItsKeysAreGone) {
  seal_store();
  const std::string id = write(*open(), texts(0, 3)).id;
  auto config = nlohmann::json::parse(read_small_file(options_.directory + "/store.json").value());
  config.erase("keys");
  const std::string without = config.dump();
  write_file(options_.directory + "/store.json", std::as_bytes(std::span(without)));
  options_.key = {};
  EXPECT_EQ(Store::open(options_).error().code(), ErrorCode::damaged);
  EXPECT_EQ(Store::open_or_create(options_).error().code(), ErrorCode::damaged);
  const StorePaths paths = {options_.directory};
  // Not even where plain ones were put beside them, of whatever name.
  for (const char digit : {'0', '8', 'f'}) {
    write_file(paths.snapshot(std::string(32, digit)), std::as_bytes(std::span(without)));
  }
  EXPECT_EQ(Store::open_or_create(options_).error().code(), ErrorCode::damaged);
  std::filesystem::rename(paths.snapshot(id), paths.in_trash(id));
  EXPECT_EQ(Store::open_or_create(options_).error().code(), ErrorCode::damaged);
}

TEST_F(ASealedStore, NoticesAPackThatWasChanged) {
  seal_store();
  const auto store = open();
  const Written first = write(*store, texts(0, 3));
  const auto pack = std::filesystem::directory_iterator(store->paths().packs())->path();
  auto bytes = read_file(pack);
  bytes[4096 + 30] ^= std::byte{1};
  write_file(pack, bytes);
  PageBytes page;
  const auto fresh = Store::open(options_).value();
  EXPECT_EQ(fresh->open_snapshot(first.id).value()->read_page(0, page).error().code(),
            ErrorCode::damaged);
  EXPECT_TRUE(fresh->open_snapshot(first.id).value()->read_page(1, page));
}

class OpeningAStore : public StoreTest {};

TEST_F(OpeningAStore, TakesOnlyStores) {
  EXPECT_EQ(Store::open(options_).error().code(), ErrorCode::usage);
  std::filesystem::create_directory(options_.directory);
  write_file(options_.directory + "/somebody's", {});
  EXPECT_EQ(Store::open_or_create(options_).error().code(), ErrorCode::usage);
  EXPECT_EQ(files_in(options_.directory), 1u);
}

TEST_F(OpeningAStore, RefusesNewerVersions) {
  open();
  const std::string config = options_.directory + "/store.json";
  const std::string newer = R"({"format":"vmsnap store","version":2,"id":"x"})";
  write_file(config, std::as_bytes(std::span(newer)));
  EXPECT_EQ(Store::open(options_).error().code(), ErrorCode::unsupported);
  const std::string cut = "{";
  write_file(config, std::as_bytes(std::span(cut)));
  EXPECT_EQ(Store::open(options_).error().code(), ErrorCode::damaged);
}

// As the message about a damaged one advises.
TEST_F(OpeningAStore, MakesALockThatWasRemovedAnew) {
  const std::string lock = options_.directory + "/lock";
  const std::string damage(8, '\xff');
  const std::string id = write(*open(), texts(0, 3)).id;
  write_file(lock, std::as_bytes(std::span(damage)));
  EXPECT_EQ(Store::open(options_).error().code(), ErrorCode::damaged);
  std::filesystem::remove(lock);
  const auto store = Store::open(options_);
  ASSERT_TRUE(store) << store.error().message();
  EXPECT_EQ(std::filesystem::status(lock).permissions(), std::filesystem::perms(0600));
  std::filesystem::remove(lock);
  EXPECT_TRUE(StoreLock::maintain((*store)->paths(), std::chrono::milliseconds(0)));
  expect_pages(**store, id, texts(0, 3));
}

TEST_F(OpeningAStore, GoesOnAfterACreatorThatWasKilled) {
  std::filesystem::create_directories(options_.directory + "/packs");
  EXPECT_TRUE(Store::open_or_create(options_));
}

// A new configuration has another key: nothing would open what is there.
TEST_F(OpeningAStore, DoesNotMakeOneOverWhatALostConfigurationOpens) {
  for (const bool sealed : {false, true}) {
    options_.directory = directory_.file(sealed ? "sealed" : "plain");
    if (sealed) seal_store();
    const std::string id = write(*open(), texts(0, 3)).id;
    const std::string config = options_.directory + "/store.json";
    std::filesystem::rename(config, directory_.file("saved"));
    const auto made = Store::open_or_create(options_);
    ASSERT_FALSE(made);
    EXPECT_EQ(made.error().code(), ErrorCode::damaged);
    EXPECT_NE(made.error().message().find("/snapshots"), std::string::npos);
    EXPECT_NE(made.error().remedy().find("store.json"), std::string::npos);
    EXPECT_FALSE(std::filesystem::exists(config));
    std::filesystem::rename(directory_.file("saved"), config);
    expect_pages(*open(), id, texts(0, 3));
  }
}

TEST_F(OpeningAStore, DoesNotMakeOneOverAnythingThatWasKept) {
  for (const char* name : {"snapshots", "trash", "packs", "condemned", "quarantine"}) {
    options_.directory = directory_.file(name);
    open();
    std::filesystem::remove(options_.directory + "/store.json");
    EXPECT_TRUE(Store::open_or_create(options_)) << name;  // the skeleton of a new one
    std::filesystem::remove(options_.directory + "/store.json");
    write_file(options_.directory + "/" + name + "/anything", {});
    const auto made = Store::open_or_create(options_);
    ASSERT_FALSE(made) << name;
    EXPECT_EQ(made.error().code(), ErrorCode::damaged);
    EXPECT_NE(made.error().message().find(name), std::string::npos);
  }
}

TEST_F(OpeningAStore, MayBeTheFirstTimeForSeveral) {
  for (int round = 0; round < 20; ++round) {
    options_.directory = directory_.file(std::to_string(round));
    std::vector<std::thread> threads;
    for (uint64_t i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        const auto store = Store::open_or_create(options_);
        ASSERT_TRUE(store) << store.error().message();
        write(**store, texts(i, 1));
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(files_in(options_.directory + "/snapshots"), 4u);
  }
}

}  // namespace
}  // namespace vmsnap
