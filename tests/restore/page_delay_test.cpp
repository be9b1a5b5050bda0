// Pages that cannot be read now, and then can.
#include <cerrno>

#include "formats/log.h"
#include "tests/restore/server_thread.h"

namespace vmsnap::testing {
namespace {

class PageDelayTest : public PageServerTest {
 protected:
  void SetUp() override {
    PageServerTest::SetUp();
    set_log_sink([this](LogLevel, std::string_view line) {
      std::lock_guard lock(log_mutex_);
      log_.emplace_back(line);
    });
  }
  ~PageDelayTest() override { set_log_sink({}); }
  std::vector<std::string> log() {
    std::lock_guard lock(log_mutex_);
    return log_;
  }
  Target failing_target() { return target(open_failing_image(path_, error_number_)); }

  std::atomic<int> error_number_ = EMFILE;

 private:
  std::mutex log_mutex_;
  std::vector<std::string> log_;
};

TEST_F(PageDelayTest, WhoTouchesOneWaitsAndTheOthersAreServed) {
  auto [served, image, marks, uffd] = failing_target();
  PageServerOptions options = no_fill();
  options.vm = "the child";
  ServerThread server(uffd, *image, marks, served->ranges(), options);
  for (uint64_t page = 1; page < 50; page += 3) served->begin_read(page);
  wait_until([&] { return !log().empty(); });
  // A page of zeros needs no pack. More often than there are answerers.
  for (uint64_t page = 300; page < 360; page += 3) EXPECT_EQ(served->read(page), Page{});
  for (uint64_t page = 1; page < 50; page += 3) EXPECT_FALSE(served->has_read(page)) << page;
  std::this_thread::sleep_for(std::chrono::milliseconds(250));  // it is tried again
  error_number_ = 0;
  for (uint64_t page = 1; page < 50; page += 3) {
    wait_until([&] { return served->has_read(page); });
    EXPECT_EQ(served->shown(page), expected_page(page)) << page;
  }
  server.stop();
  EXPECT_EQ(server->counters().poisoned + server->counters().left_missing, 0u);
  EXPECT_EQ(log(), std::vector<std::string>{
                       "the child: pages cannot be read at the moment: cannot open the pack: Too "
                       "many open files. Nothing is lost: what touches them waits, and goes on "
                       "when this is put right."});
}

TEST_F(PageDelayTest, TheFillGoesOnAfterwards) {
  auto [served, image, marks, uffd] = failing_target();
  ServerThread server(uffd, *image, marks, served->ranges());
  wait_until([&] { return !log().empty(); });
  served->begin_read(1);
  EXPECT_EQ(served->read(3), Page{});
  EXPECT_EQ(server->counters().filled(), 0u);
  error_number_ = 0;
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  EXPECT_EQ(server->counters().filled(), pages - pages / 3);
  for (uint64_t page = 0; page < pages; ++page) {
    ASSERT_EQ(served->read(page), expected_page(page)) << page;
  }
  EXPECT_EQ(log().size(), 1u);
}

TEST_F(PageDelayTest, StopsWhileTheyWait) {
  auto [served, image, marks, uffd] = failing_target();
  ServerThread server(uffd, *image, marks, served->ranges());
  served->begin_read(1);
  wait_until([&] { return !log().empty(); });
  EXPECT_EQ(server.stop(), ServeEnd::stopped);
}

// Without a pidfd, and while the fault of a dead process is tried again and again.
TEST_F(PageDelayTest, EndsWithTheVmWhileTheyWait) {
  auto [served, image, marks, uffd] = failing_target();
  ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
  served->begin_read(1);
  wait_until([&] { return !log().empty(); });
  served->kill();
  EXPECT_EQ(server.wait(), ServeEnd::vm_gone);
}

TEST_F(PageDelayTest, EndsWithAVmThatDiedBetweenTwoServers) {
  auto [served, image, marks, uffd] = failing_target();
  {
    ServerThread server(uffd, *image, marks, served->ranges());
    served->begin_read(1);
    wait_until([&] { return !log().empty(); });
    server.stop();
  }
  served->kill();
  ServerThread server(uffd, *image, marks, served->ranges());
  EXPECT_EQ(server.wait(), ServeEnd::vm_gone);
}

TEST_F(PageDelayTest, AFailingDiskIsNoDelay) {
  error_number_ = EIO;
  auto [served, image, marks, uffd] = failing_target();
  ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
  EXPECT_EQ(served->read(1), std::nullopt) << "a SIGBUS was due";
  server.stop();
  EXPECT_EQ(server->counters().poisoned, 1u);
}

TEST_F(PageDelayTest, HugePagesWaitWhole) {
  const HugePages pool;
  auto child_of_huge_pages = child(MemoryKind::huge, 1024);
  if (!child_of_huge_pages) GTEST_SKIP() << "no huge pages are free";
  auto [served, image, marks, uffd] =
      target(std::move(child_of_huge_pages), open_failing_image(path_, error_number_));
  ServerThread server(uffd, *image, marks, served->ranges());
  served->begin_read(513);
  wait_until([&] { return !log().empty(); });
  EXPECT_FALSE(served->has_read(513));
  error_number_ = 0;
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  for (uint64_t page = 0; page < 1024; ++page) {
    ASSERT_EQ(served->read(page), expected_page(page)) << page;
  }
}

}  // namespace
}  // namespace vmsnap::testing
