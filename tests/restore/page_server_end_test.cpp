// Page servers and processes that end, and successors.
#include "tests/restore/server_thread.h"

namespace vmsnap::testing {
namespace {

using PageServerEndTest = PageServerTest;

TEST_F(PageServerEndTest, ASuccessorAnswersWhoWaits) {
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

TEST_F(PageServerEndTest, ServersKilledOverAndOverLoseNothing) {
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

TEST_F(PageServerEndTest, SeesTheDeathOfTheProcess) {
  for (const bool with_pidfd : {true, false}) {
    auto [served, image, marks, uffd] = target();
    PageServerOptions options = no_fill();
    if (with_pidfd) options.pidfd = served->process().pidfd();
    ServerThread server(uffd, *image, marks, served->ranges(), options);
    EXPECT_EQ(served->read(1), expected_page(1));
    served->kill();
    EXPECT_EQ(server.wait(), ServeEnd::vm_gone) << with_pidfd;
  }
}

TEST_F(PageServerEndTest, ARemovalThatWasReadIsNotLost) {
  auto [served, image, marks, uffd] = target();
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

}  // namespace
}  // namespace vmsnap::testing
