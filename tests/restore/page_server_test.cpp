// The page server against real processes.
#include "restore/page_server.h"

#include <sys/mount.h>

#include <chrono>
#include <thread>

#include "formats/log.h"
#include "restore/guest_ram.h"
#include "tests/restore/served_child.h"

namespace vmsnap::testing {
namespace {

constexpr uint64_t pages = 1200;  // more than two extents, the last one not whole

template <class Condition>
void wait_until(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    ASSERT_LT(std::chrono::steady_clock::now(), end) << "waited in vain";
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// A page server for one child, in a thread.
class ServerThread {
 public:
  ServerThread(const Uffd& uffd, const ImageReader& image, PageMarks& marks,
               std::vector<ServedRange> ranges, PageServerOptions options = {})
      : server_(uffd, image, marks, std::move(ranges), std::move(options)),
        thread_([this] { end_ = server_.serve(); }) {}
  ~ServerThread() {
    server_.stop();
    if (thread_.joinable()) thread_.join();
  }
  PageServer& operator*() { return server_; }
  PageServer* operator->() { return &server_; }
  ServeEnd wait() {
    if (thread_.joinable()) thread_.join();
    EXPECT_TRUE(end_ && *end_) << (end_ ? end_->error().message() : "");
    return end_ && *end_ ? **end_ : ServeEnd::stopped;
  }
  ServeEnd stop() {
    server_.stop();
    return wait();
  }

 private:
  PageServer server_;
  std::optional<Result<ServeEnd>> end_;
  std::thread thread_;
};

class PageServerTest : public ::testing::TestWithParam<MemoryKind> {
 protected:
  void SetUp() override { ASSERT_NO_FATAL_FAILURE(write_image(path_, pages)); }

  std::unique_ptr<ServedChild> child(MemoryKind kind = MemoryKind::anonymous,
                                     uint64_t count = pages) {
    return ServedChild::start(count, kind);
  }
  static PageServerOptions no_fill() {
    PageServerOptions options;
    options.prefetch = Prefetch::none;
    return options;
  }

  TemporaryDirectory directory_;
  const std::string path_ = directory_ / "small.img";
};

INSTANTIATE_TEST_SUITE_P(Kinds, PageServerTest,
                         ::testing::Values(MemoryKind::anonymous, MemoryKind::shared));

TEST_P(PageServerTest, GivesEachPageWhenItIsTouched) {
  const auto served = child(GetParam());
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
  for (uint64_t page = 0; page < pages; page += 7) {
    EXPECT_EQ(served->read(page), expected_page(page)) << page;
  }
  EXPECT_EQ(server.stop(), ServeEnd::stopped);
  const PageServerCounters counters = server->counters();
  EXPECT_EQ(counters.filled_by_background, 0u);
  EXPECT_GT(counters.filled_by_fault, 0u);
  EXPECT_GE(counters.faults, counters.filled_by_fault);
}

TEST_P(PageServerTest, FillsAndLetsGo) {
  const auto served = child(GetParam());
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  ServerThread server(uffd, *image, marks, served->ranges());
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  EXPECT_EQ(server->counters().filled_by_background, pages - pages / 3);
  // Nobody serves any more, and every page reads right, the zero ones too.
  for (uint64_t page = 0; page < pages; ++page) {
    ASSERT_EQ(served->read(page), expected_page(page)) << page;
  }
}

TEST_P(PageServerTest, FillsWhileTheProcessReadsAndWrites) {
  const auto served = child(GetParam());
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  ServerThread server(uffd, *image, marks, served->ranges());
  for (uint64_t page = pages - 1; page > 100; page -= 13) served->write(page);
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  for (uint64_t page = 0; page < pages; ++page) {
    const bool written = page > 100 && (pages - 1 - page) % 13 == 0;
    ASSERT_EQ(served->read(page), written ? ServedChild::written_page() : expected_page(page))
        << page;
  }
}

TEST_F(PageServerTest, WhatIsGivenBackIsZeroFromThenOn) {
  const auto served = child();
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  {
    ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
    EXPECT_EQ(served->read(100), expected_page(100));
    served->give_back(100, 8);  // one page that was given, seven that were not
    for (uint64_t page = 100; page < 108; ++page) EXPECT_EQ(served->read(page), Page{});
    EXPECT_EQ(served->read(108), expected_page(108));
    EXPECT_EQ(server->counters().removed, 8u);
    served->give_back(200, 2);
  }
  // A successor with the same marks, and its fill, know it too.
  ServerThread server(uffd, *image, marks, served->ranges());
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  for (uint64_t page = 99; page < 203; ++page) {
    const bool gone = (page >= 100 && page < 108) || page == 200 || page == 201;
    EXPECT_EQ(served->read(page), gone ? Page{} : expected_page(page)) << page;
  }
}

TEST_F(PageServerTest, GivingBackWhileTheFillIsAtWork) {
  const auto served = child();
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  ServerThread server(uffd, *image, marks, served->ranges());
  for (uint64_t page = 10; page + 4 < pages; page += 40) served->give_back(page, 4);
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  for (uint64_t page = 0; page < pages; ++page) {
    const bool gone = page >= 10 && (page - 10) % 40 < 4;
    ASSERT_EQ(served->read(page), gone ? Page{} : expected_page(page)) << page;
  }
}

TEST_F(PageServerTest, APunchedHoleOfAGivenPageIsZero) {
  const auto served = child(MemoryKind::shared);
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
  EXPECT_EQ(served->read(100), expected_page(100));
  served->punch_hole(100, 1);
  EXPECT_EQ(served->read(100), Page{});
}

TEST_F(PageServerTest, ADamagedPageIsPoisonedAndTheOthersAreServed) {
  ASSERT_NO_FATAL_FAILURE(damage_page(path_, 301));
  for (const bool fill : {false, true}) {
    const auto served = child();
    ASSERT_TRUE(served);
    const auto image = open_image(path_);
    auto marks = *PageMarks::in_memory(pages);
    const Uffd uffd = served->take_uffd();
    std::string log;
    set_log_sink([&](LogLevel, std::string_view line) { log = line; });
    PageServerOptions options;
    options.prefetch = fill ? Prefetch::all : Prefetch::none;
    options.vm = "the child";
    ServerThread server(uffd, *image, marks, served->ranges(), options);
    if (fill) {
      EXPECT_EQ(server.wait(), ServeEnd::filled);
    }
    EXPECT_EQ(served->read(301), std::nullopt) << "a SIGBUS was due";
    EXPECT_EQ(served->read(302), expected_page(302));
    server.stop();
    EXPECT_EQ(server->counters().poisoned, 1u);
    EXPECT_EQ(server->counters().left_missing, 0u);
    set_log_sink({});
    EXPECT_NE(log.find("the child: the page at offset 0x"), std::string::npos) << log;
    EXPECT_NE(log.find(" of range0 cannot be read back: "), std::string::npos) << log;
    EXPECT_NE(log.find("It is poisoned: touching it is a memory error."), std::string::npos) << log;
  }
}

TEST_F(PageServerTest, WithoutPoisonADamagedPageIsLeftMissing) {
  ASSERT_NO_FATAL_FAILURE(damage_page(path_, 301));
  const auto served = child();
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  PageServerOptions options;
  options.use_poison = false;
  ServerThread server(uffd, *image, marks, served->ranges(), options);
  served->begin_read(301);
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  EXPECT_GE(server->counters().left_missing, 1u);
  EXPECT_EQ(served->read(300), expected_page(300));
  EXPECT_EQ(served->read(304), expected_page(304));
  EXPECT_FALSE(served->has_read(301)) << "it must wait, not read zeros";
  EXPECT_TRUE(uffd.wake(served->ranges()[0].range));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(served->has_read(301));
}

TEST_F(PageServerTest, ASuccessorAnswersWhoWaits) {
  const auto served = child();
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  {
    // A predecessor that read the fault and died before it answered.
    const Uffd uffd = served->take_uffd();
    served->begin_read(50);
    served->begin_read(51);
    size_t events = 0;
    wait_until([&] { return (events += uffd.read_events()->size()) == 2; });
  }
  EXPECT_FALSE(served->has_read(50)) << "fed without a server";
  const Uffd uffd = served->take_uffd();
  ServerThread server(uffd, *image, marks, served->ranges());
  wait_until([&] { return served->has_read(50) && served->has_read(51); });
  EXPECT_EQ(served->shown(50), expected_page(50));
  EXPECT_EQ(served->shown(51), expected_page(51));
  EXPECT_EQ(server.wait(), ServeEnd::filled);
}

TEST_F(PageServerTest, ServersKilledOverAndOverLoseNothing) {
  const auto served = child();
  ASSERT_TRUE(served);
  const std::string marks_path = directory_ / "pages";
  { ASSERT_TRUE(PageMarks::create(marks_path, pages)); }
  for (int round = 0; round < 20; ++round) {
    // A whole process, so that it can be killed at any instant.
    const pid_t server = ::fork();
    if (server == 0) {
      const auto image = open_image(path_);
      auto marks = *PageMarks::open(marks_path, pages);
      const Uffd uffd = served->take_uffd();
      PageServer page_server(uffd, *image, marks, served->ranges(), {});
      ::_exit(page_server.serve() ? 0 : 1);
    }
    const uint64_t page = 20 + static_cast<uint64_t>(round) * 50;
    served->begin_read(page);
    served->give_back(page + 3, 2);
    ::usleep(static_cast<useconds_t>(round % 5) * 300);
    ::kill(server, SIGKILL);
    int status = 0;
    ::waitpid(server, &status, 0);
    if (WIFEXITED(status)) {
      ASSERT_EQ(WEXITSTATUS(status), 0);
    }
  }
  const auto image = open_image(path_);
  auto marks = *PageMarks::open(marks_path, pages);
  const Uffd uffd = served->take_uffd();
  ServerThread server(uffd, *image, marks, served->ranges());
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  for (uint64_t page = 0; page < pages; ++page) {
    const uint64_t in_round = page < 20 ? 0 : (page - 20) % 50;
    const bool gone = page >= 20 && page < 1020 && (in_round == 3 || in_round == 4);
    ASSERT_EQ(served->read(page), gone ? Page{} : expected_page(page)) << page;
  }
}

TEST_F(PageServerTest, SeesTheDeathOfTheProcess) {
  for (const bool with_pidfd : {true, false}) {
    const auto served = child();
    ASSERT_TRUE(served);
    const auto image = open_image(path_);
    auto marks = *PageMarks::in_memory(pages);
    const Uffd uffd = served->take_uffd();
    PageServerOptions options = no_fill();
    if (with_pidfd) options.pidfd = served->process().pidfd();
    ServerThread server(uffd, *image, marks, served->ranges(), options);
    EXPECT_EQ(served->read(1), expected_page(1));
    served->kill();
    EXPECT_EQ(server.wait(), ServeEnd::vm_gone) << with_pidfd;
  }
}

TEST_F(PageServerTest, PagesOfSeveralRangesInAnyOrder) {
  const auto served = child(MemoryKind::anonymous, 1100);
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  const RemotePtr start = served->ranges()[0].range.start;
  // The process's first 500 pages are the image's last, and the other way round.
  const std::vector<ServedRange> ranges = {
      {{start, 500 * page_size}, 700, page_size, "b"},
      {{start + 500 * page_size, 600 * page_size}, 0, page_size, "a"}};
  ServerThread server(uffd, *image, marks, ranges);
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  for (uint64_t page = 0; page < 500; ++page)
    ASSERT_EQ(served->read(page), expected_page(page + 700));
  for (uint64_t page = 500; page < 1100; ++page)
    ASSERT_EQ(served->read(page), expected_page(page - 500));
}

// Two huge pages are enough; they are taken from the pool for the test's time.
class HugePages {
 public:
  HugePages() : before_(*read_small_file(path)) { set("8"); }
  ~HugePages() { set(before_); }

 private:
  static constexpr const char* path = "/proc/sys/vm/nr_hugepages";
  static void set(const std::string& value) {
    if (auto fd = open_file(path, O_WRONLY))
      (void)write_all(fd->get(), std::as_bytes(std::span(value)), path);
  }
  std::string before_;
};

TEST_F(PageServerTest, HugePagesComeWhole) {
  const HugePages pool;
  const uint64_t huge_pages = 2, count = huge_pages * 512;
  const auto served = child(MemoryKind::huge, count);
  if (!served) GTEST_SKIP() << "no huge pages are free";
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  {
    ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
    EXPECT_EQ(served->read(513), expected_page(513));
    server.stop();
    EXPECT_EQ(server->counters().filled_by_fault, 512u);
  }
  ServerThread server(uffd, *image, marks, served->ranges());
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  for (uint64_t page = 0; page < count; ++page)
    ASSERT_EQ(served->read(page), expected_page(page)) << page;
}

TEST_F(PageServerTest, ARemovalThatWasReadIsNotLost) {
  const auto served = child();
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  {
    ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
    EXPECT_EQ(served->read(10), expected_page(10));
    EXPECT_EQ(served->read(11), expected_page(11));
  }
  // A predecessor that read the events of two removals, of a page that it had
  // given and of one that it had not, and died before their marks.
  for (const uint64_t page : {10, 13}) {
    std::thread reader([&] {
      wait_until([&] {
        return !uffd.read_messages(marks.event_buffer().subspan(page * 32 - 320, 32))->empty();
      });
    });
    served->give_back(page, 1);
    reader.join();
    ASSERT_FALSE(marks.removed(page));
  }
  ServerThread server(uffd, *image, marks, served->ranges());
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  EXPECT_EQ(served->read(10), Page{});
  EXPECT_EQ(served->read(11), expected_page(11));
  EXPECT_EQ(served->read(13), Page{});
  EXPECT_EQ(served->read(14), expected_page(14));
}

TEST_F(PageServerTest, PagesThatWereThereAreOverwritten) {
  const auto served = child();
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  // As if written before: one page that is zero in the image, one that is not.
  const Page old = ServedChild::written_page();
  for (const uint64_t page : {30, 31}) {
    ASSERT_TRUE(uffd.copy(served->ranges()[0].address_of(page), old));
  }
  EXPECT_EQ(*overwrite_present_pages(served->process(), *image, served->ranges(), marks), 2u);
  EXPECT_EQ(served->read(30), Page{});
  EXPECT_EQ(served->read(31), expected_page(31));
  EXPECT_TRUE(marks.resolved(31));
}

}  // namespace
}  // namespace vmsnap::testing
