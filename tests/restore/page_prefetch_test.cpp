// What the page server loads that nobody touched, and what it notes of faults.
#include <numeric>

#include "tests/restore/server_thread.h"

namespace vmsnap::testing {
namespace {

class PagePrefetchTest : public PageServerTest {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(
        write_image(path_, pages, {{"kind", "process"}}, {}, {700, 40, 43, 301}));
  }
  static PageServerOptions options(Prefetch prefetch) {
    PageServerOptions options;
    options.prefetch = prefetch;
    return options;
  }
};

TEST_F(PagePrefetchTest, NoneLoadsNothingAndServesUntilTheProcessIsGone) {
  auto [served, image, marks, uffd] = target();
  PageServerOptions none = options(Prefetch::none);
  none.pidfd = served->process().pidfd();
  ServerThread server(uffd, *image, marks, served->ranges(), none);
  server->begin_fill();
  for (uint64_t page = 0; page < pages; ++page) {
    ASSERT_EQ(served->read(page), expected_page(page)) << page;
  }
  served->kill();
  EXPECT_EQ(server.wait(), ServeEnd::vm_gone);
  EXPECT_EQ(server->counters().filled_by_background, 0u);
  EXPECT_EQ(server->counters().filled_by_fault, server->counters().data_pages);
}

TEST_F(PagePrefetchTest, TheWorkingSetAloneIsLoadedByItsPages) {
  auto [served, image, marks, uffd] = target();
  ServerThread server(uffd, *image, marks, served->ranges(), options(Prefetch::working_set));
  // 40, 41 and 43 (42 is zero), 301 and 700.
  wait_until([&] { return server->counters().filled() >= 5; });
  EXPECT_EQ(served->read(900), expected_page(900));
  EXPECT_EQ(served->read(901), expected_page(901));
  EXPECT_EQ(server.stop(), ServeEnd::stopped);
  EXPECT_EQ(server->counters().filled_by_background, 5u);
  for (const uint64_t page : {40, 41, 43, 301, 700}) EXPECT_TRUE(marks.resolved(page)) << page;
}

TEST_F(PagePrefetchTest, NothingIsLoadedBeforeItIsTold) {
  auto [served, image, marks, uffd] = target();
  PageServerOptions later = options(Prefetch::all);
  later.prefetch_at_once = false;
  ServerThread server(uffd, *image, marks, served->ranges(), later);
  EXPECT_EQ(served->read(1), expected_page(1));
  EXPECT_EQ(server->counters().filled_by_background, 0u);
  server->begin_fill();
  EXPECT_EQ(server.wait(), ServeEnd::filled);
}

TEST_F(PagePrefetchTest, FaultsAreRecordedInTheirOrderDataPagesOnce) {
  auto [served, image, marks, uffd] = target();
  WorkingSetRecorder recorder(pages, 4);
  PageServerOptions none = options(Prefetch::none);
  none.recorder = &recorder;
  ServerThread server(uffd, *image, marks, served->ranges(), none);
  for (const uint64_t page : {800, 2, 3, 799, 2}) (void)served->read(page);
  served->give_back(2, 1);
  (void)served->read(2);
  EXPECT_EQ(recorder.pages(), (std::vector<uint64_t>{800, 2, 799}));
  for (const uint64_t page : {1000, 1001, 1003}) (void)served->read(page);
  EXPECT_EQ(recorder.pages(), (std::vector<uint64_t>{800, 2, 799, 1000})) << "beyond its limit";
}

}  // namespace
}  // namespace vmsnap::testing
