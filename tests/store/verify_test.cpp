#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <set>
#include <thread>
#include <utility>

#include "formats/clock.h"
#include "formats/image_file.h"
#include "formats/store/store_verify.h"
#include "formats/store/verify_state.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

class VerifyingAStore : public StoreTest {
 protected:
  // Of at least `count` packs, in no order.
  std::vector<std::string> packs_of(const Store& store) {
    std::vector<std::string> paths;
    for (const auto& entry : std::filesystem::directory_iterator(store.paths().packs())) {
      paths.push_back(entry.path());
    }
    return paths;
  }

  static void flip(const std::string& path, uint64_t offset) {
    auto bytes = read_file(path);
    bytes.at(offset) ^= std::byte{1};
    write_file(path, bytes);
  }

  static std::vector<PageBytes> random_pages(uint64_t first, size_t count) {
    std::vector<PageBytes> pages;
    for (size_t i = 0; i < count; ++i) pages.push_back(random_page(first + i));
    return pages;
  }
};

TEST_F(VerifyingAStore, FindsNothingInAWholeOne) {
  const auto store = open();
  write(*store, texts(0, 700), {.vm = "a"});
  write(*store, random_pages(0, 600), {.vm = "b", .pack_bytes = 1 << 20});
  const Written gone = write(*store, texts(300, 700), {.vm = "c"});
  std::filesystem::rename(store->paths().snapshot(gone.id), store->paths().in_trash(gone.id));
  uint64_t last = 0;
  const StoreVerifyReport report =
      verify_store(*store, {}, [&](const StoreVerifyProgress& p) { last = p.packs_done; }).value();
  EXPECT_TRUE(report.ok()) << report.status().error().message();
  EXPECT_EQ(report.snapshots, 3u);
  EXPECT_EQ(report.packs, files_in(store->paths().packs()));
  EXPECT_EQ(report.packs_checked, report.packs);
  EXPECT_EQ(last, report.packs);
  EXPECT_EQ(report.frames_checked, 700u + 600 + 300);
  EXPECT_EQ(VerifyState::load(store->paths()).packs.size(), report.packs);
}

TEST_F(VerifyingAStore, FindsNothingInAWholeSealedOne) {
  seal_store();
  const auto store = open();
  write(*store, texts(0, 700));
  const StoreVerifyReport report = verify_store(*store, {}).value();
  EXPECT_TRUE(report.ok()) << report.status().error().message();
  EXPECT_EQ(report.frames_checked, 700u);
  // What needs no key is checked without one.
  layout::ImageId id;
  ASSERT_TRUE(parse_id(std::filesystem::path(packs_of(*store)[0]).filename().string(), id));
  const PackCheck check = check_pack(store->paths(), id, nullptr, {}).value();
  EXPECT_TRUE(check.whole()) << check.reasons[0];
  EXPECT_EQ(check.frames, 700u);
  flip(packs_of(*store)[0], layout::frames_begin + 40);
  EXPECT_EQ(check_pack(store->paths(), id, nullptr, {}).value().lost_frames,
            std::vector<uint64_t>{layout::frames_begin});
}

TEST_F(VerifyingAStore, NamesTheSnapshotsAndPagesThatAreHit) {
  const auto store = open();
  const std::vector<PageBytes> pages = random_pages(0, 20);
  const Written a = write(*store, pages, {.vm = "a"}, 1000);
  const Written b = write(*store, texts(0, 20), {.vm = "b"}, 2000);
  // The frames of pages 0 and 1 are the first two of their pack.
  layout::ImageId id;
  std::string pack;
  for (const std::string& path : packs_of(*store)) {
    if (std::filesystem::file_size(path) > 20 * page_size) pack = path;
  }
  ASSERT_TRUE(parse_id(std::filesystem::path(pack).filename().string(), id));
  flip(pack, layout::frames_begin + 100);
  flip(pack, layout::frames_begin + 100 + page_size);

  const StoreVerifyReport report = verify_store(*store, {}).value();
  ASSERT_EQ(report.damaged_packs.size(), 1u);
  EXPECT_EQ(report.damaged_packs[0].id, id);
  EXPECT_EQ(report.damaged_packs[0].lost_frames,
            (std::vector<uint64_t>{layout::frames_begin, layout::frames_begin + 16 + page_size}));
  ASSERT_EQ(report.damaged_snapshots.size(), 1u);
  const StoreVerifyReport::Snapshot& hit = report.damaged_snapshots[0];
  EXPECT_EQ(hit.id, a.id);
  EXPECT_EQ(hit.vm, "a");
  EXPECT_EQ(hit.created_unix_ms, 1000);
  ASSERT_EQ(hit.report.damaged.size(), 1u);
  EXPECT_EQ(hit.report.damaged[0].region, "region0");
  EXPECT_EQ(hit.report.damaged[0].offset, 0u);
  EXPECT_EQ(hit.report.damaged[0].page_count, 2u);
  EXPECT_EQ(report.status().error().code(), ErrorCode::damaged);
  EXPECT_NE(report.status().error().remedy().find("vmsnap repair --store"), std::string::npos);
  // The other one alone is whole.
  EXPECT_TRUE(verify_store(*store, {.snapshots = {b.id}}).value().ok());
  EXPECT_EQ(verify_store(*store, {.snapshots = {"x"}}).error().code(), ErrorCode::usage);
}

TEST_F(VerifyingAStore, DoesNotMissPacksThatNobodyNeeds) {
  const auto store = open();
  const Written a = write(*store, texts(0, 20), {.vm = "a"});
  const auto pack = packs_of(*store).at(0);
  write(*store, texts(50, 20), {.vm = "b"});
  std::filesystem::remove(store->paths().snapshot(a.id));
  std::filesystem::remove(pack);
  EXPECT_TRUE(verify_store(*store, {}).value().ok());
}

TEST_F(VerifyingAStore, FindsPacksThatWaitToBeDeleted) {
  const auto store = open();
  write(*store, texts(0, 20));
  const std::filesystem::path pack = packs_of(*store).at(0);
  std::filesystem::rename(pack, store->paths().condemned() + "/7." + pack.filename().string());
  const StoreVerifyReport report = verify_store(*store, {}).value();
  EXPECT_TRUE(report.ok());
  EXPECT_EQ(report.packs_checked, 1u);
}

TEST_F(VerifyingAStore, ASampleTakesWhatIsLongestAgo) {
  const auto store = open();
  for (uint64_t i = 0; i < 4; ++i) {
    write(*store, random_pages(100 * i, 50), {.vm = std::to_string(i)});
  }
  std::set<layout::ImageId> seen;
  for (int run = 0; run < 4; ++run) {
    // A quarter of all bytes is a little less than a pack, or just one.
    const StoreVerifyReport report = verify_store(*store, {.sample = 0.24}).value();
    EXPECT_TRUE(report.ok());
    EXPECT_EQ(report.packs_checked, 1u);
    for (const auto& [id, pack] : VerifyState::load(store->paths()).packs) seen.insert(id);
    EXPECT_EQ(seen.size(), run + 1u);
  }
  // Damage is not forgotten because its pack is not due.
  flip(packs_of(*store)[2], layout::frames_begin + 100);
  EXPECT_FALSE(verify_store(*store, {}).value().ok());
  for (int run = 0; run < 4; ++run) {
    const StoreVerifyReport report = verify_store(*store, {.sample = 0.24}).value();
    EXPECT_EQ(report.damaged_packs.size(), 1u);
    EXPECT_EQ(report.packs_checked, 2u);
  }
}

TEST_F(VerifyingAStore, GoesOnWhereItWasKilled) {
  const auto store = open();
  for (uint64_t i = 0; i < 3; ++i) write(*store, texts(100 * i, 50), {.vm = std::to_string(i)});
  EXPECT_TRUE(verify_store(*store, {}).value().ok());
  VerifyState state = VerifyState::load(store->paths());
  EXPECT_EQ(state.began_unix_ms, 0);
  // As a run leaves it that was killed after two packs: one whole, one not.
  state.began_unix_ms = state.packs.begin()->second.at_unix_ms;
  state.packs.begin()->second.ok = false;
  std::prev(state.packs.end())->second.at_unix_ms = state.began_unix_ms - 1;
  ASSERT_TRUE(state.save(store->paths()));
  StoreVerifyReport report = verify_store(*store, {.resume = true}).value();
  EXPECT_TRUE(report.ok());
  EXPECT_EQ(report.packs_checked, 2u);
  EXPECT_EQ(report.packs_resumed, 1u);
  // That one ended, so there is nothing to go on with.
  report = verify_store(*store, {.resume = true}).value();
  EXPECT_EQ(report.packs_checked, 3u);
}

TEST_F(VerifyingAStore, StartsAnewWithoutItsNotes) {
  const auto store = open();
  write(*store, texts(0, 20));
  for (const std::string text : {"", "{", "[]", R"({"packs":{"x":1}})", R"({"packs":7})"}) {
    write_file(store->paths().verified(), std::as_bytes(std::span(text)));
    EXPECT_EQ(verify_store(*store, {.resume = true}).value().packs_checked, 1u) << text;
  }
}

// A sampled run in the night, say, beside one over everything that takes days.
TEST_F(VerifyingAStore, KeepsWhatAnotherRunNotedMeanwhile) {
  const auto store = open();
  for (uint64_t i = 0; i < 4; ++i) {
    write(*store, random_pages(100 * i, 50), {.vm = std::to_string(i)});
  }
  flip(packs_of(*store)[2], layout::frames_begin + 100);
  const auto noted = [&] { return VerifyState::load(store->paths()); };
  const auto damaged = [&] {
    return std::ranges::count_if(noted().packs, [](const auto& pack) { return !pack.second.ok; });
  };
  // A sample, and all is verified when it has just begun.
  bool first = true;
  ASSERT_TRUE(verify_store(*store, {.sample = 0.24}, [&](const StoreVerifyProgress&) {
    if (!std::exchange(first, false)) return;
    EXPECT_EQ(verify_store(*store, {}).value().damaged_packs.size(), 1u);
    EXPECT_EQ(noted().packs.size(), 4u);
    VerifyState killed = noted();
    killed.began_unix_ms = 5;
    ASSERT_TRUE(killed.save(store->paths()));
  }));
  EXPECT_EQ(noted().packs.size(), 4u);
  EXPECT_EQ(damaged(), 1);
  // And a sample knows nothing of how far a run over everything got.
  EXPECT_EQ(noted().began_unix_ms, 5);
  // The other way around, where it notes of all of them what is newer.
  ASSERT_TRUE(verify_store(*store, {}, [&](const StoreVerifyProgress& progress) {
    if (progress.packs_done != 4) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    VerifyState other = noted();
    for (auto& [id, pack] : other.packs) pack = {now_unix_ms(), false};
    ASSERT_TRUE(other.save(store->paths()));
  }));
  EXPECT_EQ(damaged(), 4);
  EXPECT_EQ(noted().began_unix_ms, 0);
}

TEST_F(VerifyingAStore, ForgetsPacksThatAreGone) {
  const auto store = open();
  const Written gone = write(*store, texts(0, 20), {.vm = "a"});
  write(*store, texts(50, 20), {.vm = "b"});
  ASSERT_TRUE(verify_store(*store, {}));
  std::filesystem::remove(store->paths().snapshot(gone.id));
  ASSERT_TRUE(verify_store(*store, {}));
  EXPECT_EQ(VerifyState::load(store->paths()).packs.size(), 1u);
}

// Else it would not be read before that day comes.
TEST_F(VerifyingAStore, DoesNotBelieveAClockThatWasAhead) {
  constexpr int64_t hour = 3'600'000;
  const auto store = open();
  for (uint64_t i = 0; i < 4; ++i) {
    write(*store, random_pages(100 * i, 50), {.vm = std::to_string(i)});
  }
  ASSERT_TRUE(verify_store(*store, {}));
  const auto id = VerifyState::load(store->paths()).packs.rbegin()->first;
  const auto date_it_ahead = [&](int64_t began) {
    VerifyState state = VerifyState::load(store->paths());
    state.packs[id].at_unix_ms = now_unix_ms() + hour;
    state.began_unix_ms = began;
    ASSERT_TRUE(state.save(store->paths()));
  };
  date_it_ahead(0);
  EXPECT_EQ(verify_store(*store, {.sample = 0.24}).value().packs_checked, 1u);
  EXPECT_LE(VerifyState::load(store->paths()).packs[id].at_unix_ms, now_unix_ms());
  const int64_t before = now_unix_ms() - hour;
  date_it_ahead(before);
  const StoreVerifyReport report = verify_store(*store, {.resume = true}).value();
  EXPECT_EQ(report.packs_checked, 1u);
  EXPECT_EQ(report.packs_resumed, 3u);
  // Nor is a run that began then one to go on with.
  date_it_ahead(now_unix_ms() + hour / 2);
  EXPECT_EQ(verify_store(*store, {.resume = true}).value().packs_checked, 4u);
}

}  // namespace
}  // namespace vmsnap
