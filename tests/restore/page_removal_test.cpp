// Memory that is given back while it is served.
#include "tests/restore/server_thread.h"

namespace vmsnap::testing {
namespace {

using PageRemovalTest = PageServerTest;

TEST_F(PageRemovalTest, WhatIsGivenBackIsZeroFromThenOn) {
  auto [served, image, marks, uffd] = target();
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

TEST_F(PageRemovalTest, GivingBackWhileTheFillIsAtWork) {
  auto [served, image, marks, uffd] = target();
  ServerThread server(uffd, *image, marks, served->ranges());
  for (uint64_t page = 10; page + 4 < pages; page += 40) served->give_back(page, 4);
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  for (uint64_t page = 0; page < pages; ++page) {
    const bool gone = page >= 10 && (page - 10) % 40 < 4;
    ASSERT_EQ(served->read(page), gone ? Page{} : expected_page(page)) << page;
  }
}

TEST_F(PageRemovalTest, APunchedHoleOfAGivenPageIsZero) {
  auto [served, image, marks, uffd] = target(child(MemoryKind::shared));
  ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
  EXPECT_EQ(served->read(100), expected_page(100));
  served->punch_hole(100, 1);
  EXPECT_EQ(served->read(100), Page{});
}

}  // namespace
}  // namespace vmsnap::testing
