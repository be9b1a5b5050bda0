#include "restore/run_dir.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <optional>
#include <thread>

#include "restore/page_marks.h"
#include "snap/vmm/process.h"
#include "tests/restore/test_image.h"

namespace vmsnap::testing {
namespace {

RestoreRecord some_record() {
  RestoreRecord record;
  record.phase = RestorePhase::running;
  record.image = "/images/a.img";
  record.image_id = "0123456789abcdef0123456789abcdef";
  record.qmp = "/run/d/qmp.sock";
  record.pid = 1234;
  record.start_time = 99;
  record.uffd = 17;
  record.server_pid = 1235;
  record.resume = false;
  record.ready_ms = 12.5;
  record.prefetch = Prefetch::working_set;
  record.record_working_set = true;
  record.ranges = {{{RemotePtr(0x10000), 0x4000}, 0, page_size, "pc.ram"},
                   {{RemotePtr(0x400000), 0x200000}, 4, 2 << 20, "huge"}};
  return record;
}

TEST(RestoreRecordTest, ComesBackAsItWas) {
  const auto back = restore_record_from_json(to_json(some_record()));
  ASSERT_TRUE(back) << back.error().message();
  EXPECT_EQ(to_json(*back), to_json(some_record()));
  EXPECT_EQ(back->phase, RestorePhase::running);
  EXPECT_EQ(back->ranges[1].unit, 2u << 20);
  EXPECT_EQ(back->uffd, 17);
  EXPECT_EQ(back->prefetch, Prefetch::working_set);
  EXPECT_TRUE(back->record_working_set);
  // As an older vmsnap wrote it.
  nlohmann::json older = to_json(some_record());
  older.erase("prefetch");
  older.erase("record_working_set");
  const auto read = restore_record_from_json(older);
  ASSERT_TRUE(read) << read.error().message();
  EXPECT_EQ(read->prefetch, Prefetch::all);
  EXPECT_FALSE(read->record_working_set);
}

// Memory that no range has would read as zeros.
TEST(RestoreRecordTest, TheRangesAreAllOfTheImage) {
  RestoreRecord record = some_record();
  EXPECT_TRUE(check_ranges(record, 4 + 512));
  std::swap(record.ranges[0], record.ranges[1]);
  EXPECT_TRUE(check_ranges(record, 4 + 512));
  for (const uint64_t pages : {515, 517}) EXPECT_FALSE(check_ranges(record, pages)) << pages;
  record.ranges[1].first_page = 1;
  EXPECT_FALSE(check_ranges(record, 4 + 512));
  record.ranges.pop_back();
  EXPECT_EQ(check_ranges(record, 512).error().code(), ErrorCode::damaged);
  EXPECT_FALSE(check_ranges(record, 4 + 512));
  record.ranges.clear();
  EXPECT_FALSE(check_ranges(record, 4 + 512));
}

TEST(RestoreRecordTest, EveryFieldIsChecked) {
  const auto error_with = [](const char* path, const nlohmann::json& value) {
    nlohmann::json json = to_json(some_record());
    json[nlohmann::json::json_pointer(path)] = value;
    const auto back = restore_record_from_json(json);
    return back ? "no error" : back.error().message();
  };
  for (const char* field : {"phase", "image", "image_id", "qmp", "pid", "start_time", "server_pid",
                            "resume", "ready_ms", "ranges", "uffd"}) {
    const std::string wrong = fmt::format("its \"{}\" is missing or wrong", field);
    const std::string path = fmt::format("/{}", field);
    EXPECT_EQ(error_with(path.c_str(), nullptr), wrong);
    EXPECT_EQ(error_with(path.c_str(), nlohmann::json::object()), wrong);
    if (std::string(field) == "uffd") continue;
    nlohmann::json json = to_json(some_record());
    json.erase(field);
    EXPECT_EQ(restore_record_from_json(json).error().message(), wrong);
  }
  EXPECT_EQ(error_with("/prefetch", "some"), "its \"prefetch\" is missing or wrong");
  EXPECT_EQ(error_with("/record_working_set", 1),
            "its \"record_working_set\" is missing or wrong");
  EXPECT_EQ(error_with("/phase", "sleeping"), "its \"phase\" is missing or wrong");
  EXPECT_EQ(error_with("/pid", -5), "its \"pid\" is missing or wrong");
  EXPECT_EQ(error_with("/pid", 1 << 23), "its \"pid\" is missing or wrong");
  EXPECT_EQ(error_with("/uffd", uint64_t{1} << 40), "its \"uffd\" is missing or wrong");
  EXPECT_EQ(error_with("/version", 2), "it was written by a newer vmsnap");
  EXPECT_EQ(error_with("/ranges/0", 5), "its \"ranges\" is missing or wrong");
  EXPECT_EQ(error_with("/ranges/0/host", 0x10001), "its \"ranges\" is missing or wrong");
  EXPECT_EQ(error_with("/ranges/0/host", ~uint64_t{0}), "its \"host\" is missing or wrong");
  EXPECT_EQ(error_with("/ranges/0/length", 0), "its \"ranges\" is missing or wrong");
  EXPECT_EQ(error_with("/ranges/0/length", 0x400000), "its \"ranges\" is missing or wrong")
      << "overlap";
  EXPECT_EQ(error_with("/ranges/0/page_bytes", 8192), "its \"page_bytes\" is missing or wrong");
  EXPECT_EQ(error_with("/ranges/0/first_page", ~uint64_t{0}),
            "its \"first_page\" is missing or wrong");
  EXPECT_EQ(restore_record_from_json(5).error().message(), "it is not a JSON object");
}

TEST(RunDirTest, IsMadePrivateAndUndone) {
  const TemporaryDirectory parent;
  const std::string path = parent / "d";
  auto dir = RunDir::create(path);
  ASSERT_TRUE(dir) << dir.error().message();
  struct stat about = {};
  ASSERT_EQ(::stat(path.c_str(), &about), 0);
  EXPECT_EQ(about.st_mode & 0777, 0700u);
  ASSERT_TRUE(dir->write(some_record()));
  EXPECT_EQ(to_json(*dir->read()), to_json(some_record()));
  dir->undo();
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(RunDirTest, AForeignDirectoryKeepsWhatIsNotOurs) {
  const TemporaryDirectory parent;
  ASSERT_TRUE(write_small_file(parent / "precious", "x"));
  auto dir = RunDir::create(parent.path());
  ASSERT_TRUE(dir) << dir.error().message();
  ASSERT_TRUE(dir->write(some_record()));
  dir->undo();
  EXPECT_TRUE(std::filesystem::exists(parent / "precious"));
  EXPECT_FALSE(std::filesystem::exists(parent / "restore.json"));
}

TEST(RunDirTest, OnePageServerAtATime) {
  const TemporaryDirectory parent;
  {
    auto dir = RunDir::create(parent.path());
    ASSERT_TRUE(dir);
    ASSERT_TRUE(dir->write(some_record()));
    for (const auto& other : {RunDir::create(parent.path()), RunDir::open(parent.path())}) {
      ASSERT_FALSE(other);
      EXPECT_EQ(other.error().code(), ErrorCode::exists);
      EXPECT_EQ(other.error().message(),
                "a page server (process 1235) is at work in " + parent.path());
    }
  }
  EXPECT_TRUE(RunDir::open(parent.path()));
}

TEST(RunDirTest, WhoTakesOverWaitsForADyingPageServer) {
  const TemporaryDirectory parent;
  std::optional<RunDir> dying = *RunDir::create(parent.path());
  ASSERT_TRUE(dying->write(some_record()));
  EXPECT_FALSE(RunDir::open(parent.path(), std::chrono::milliseconds(50)));
  std::thread death([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    dying.reset();
  });
  EXPECT_TRUE(RunDir::open(parent.path(), std::chrono::seconds(60)));
  death.join();
}

TEST(RunDirTest, ADirectoryOfALivingVmIsRefused) {
  const TemporaryDirectory parent;
  RestoreRecord record = some_record();
  const auto self = Process::open(::getpid());
  record.pid = ::getpid();
  record.start_time = self->start_time();
  { ASSERT_TRUE(RunDir::create(parent.path())->write(record)); }
  const auto refused = RunDir::create(parent.path());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::exists);
  EXPECT_EQ(refused.error().message(), self->describe() + " still runs in " + parent.path());
  // Another process that came to have its number is no reason to refuse.
  record.start_time += 1;
  { ASSERT_TRUE(RunDir::open(parent.path())->write(record)); }
  EXPECT_TRUE(RunDir::create(parent.path()));
}

TEST(RunDirTest, OfAVmThatWasParkedAndIsWholeAgain) {
  const TemporaryDirectory parent;
  RestoreRecord record = some_record();
  record.pid = ::getpid();
  record.start_time = Process::open(::getpid())->start_time();
  record.of_parked_vm = true;
  record.phase = RestorePhase::parked;
  { ASSERT_TRUE(RunDir::create(parent.path())->write(record)); }
  EXPECT_TRUE(read_restore_record(parent.path())->of_parked_vm);
  EXPECT_FALSE(RunDir::create(parent.path()));
  record.phase = RestorePhase::complete;
  { ASSERT_TRUE(RunDir::open(parent.path())->write(record)); }
  EXPECT_TRUE(RunDir::create(parent.path()));
}

TEST(RunDirTest, WhatCannotBeReadIsNotOverwritten) {
  const TemporaryDirectory parent;
  ASSERT_TRUE(write_small_file(parent / "restore.json", "{]"));
  const auto refused = RunDir::create(parent.path());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::damaged);
  EXPECT_EQ(refused.error().message(), parent / "restore.json" + ": it is not a JSON object");
}

TEST(PageMarksTest, BitsOfTwoKinds) {
  auto marks = *PageMarks::in_memory(200);
  marks.set_resolved(60, 70);
  marks.set_removed(0, 1);
  marks.set_removed(199, 5);  // beyond the end: ignored
  for (uint64_t page = 0; page < 200; ++page) {
    EXPECT_EQ(marks.resolved(page), page >= 60 && page < 130) << page;
    EXPECT_EQ(marks.removed(page), page == 0 || page == 199) << page;
    EXPECT_EQ(marks.wanted(page), !marks.resolved(page) && !marks.removed(page));
  }
  EXPECT_EQ(marks.count_resolved(0, 200), 70u);
  EXPECT_EQ(marks.count_resolved(61, 68), 68u);
  EXPECT_EQ(marks.count_resolved(64, 64), 64u);
  EXPECT_EQ(marks.count_resolved(130, 1000), 0u);
}

TEST(PageMarksTest, AFileKeepsThem) {
  const TemporaryDirectory parent;
  {
    auto marks = *PageMarks::create(parent / "pages", 1000);
    marks.set_resolved(7, 1);
    marks.set_removed(8, 2);
  }
  auto marks = PageMarks::open(parent / "pages", 1000);
  ASSERT_TRUE(marks);
  EXPECT_TRUE(marks->resolved(7));
  EXPECT_TRUE(marks->removed(9));
  EXPECT_FALSE(marks->resolved(8));
  const auto other = PageMarks::open(parent / "pages", 2000);
  ASSERT_FALSE(other);
  EXPECT_EQ(other.error().message(),
            parent / "pages" + " has 2304 bytes, not the 2560 for 2000 pages");
  EXPECT_FALSE(PageMarks::open(parent / "none", 1));
}

}  // namespace
}  // namespace vmsnap::testing
