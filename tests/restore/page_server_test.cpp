// The page server against real processes.
#include "formats/log.h"
#include "restore/guest_ram.h"
#include "tests/restore/server_thread.h"

namespace vmsnap::testing {
namespace {

class PageServerKindsTest : public PageServerTest,
                            public ::testing::WithParamInterface<MemoryKind> {};

INSTANTIATE_TEST_SUITE_P(Kinds, PageServerKindsTest,
                         ::testing::Values(MemoryKind::anonymous, MemoryKind::shared));

TEST_P(PageServerKindsTest, GivesEachPageWhenItIsTouched) {
  auto [served, image, marks, uffd] = target(child(GetParam()));
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

TEST_P(PageServerKindsTest, FillsAndLetsGo) {
  auto [served, image, marks, uffd] = target(child(GetParam()));
  ServerThread server(uffd, *image, marks, served->ranges());
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  EXPECT_EQ(server->counters().filled_by_background, pages - pages / 3);
  // Nobody serves any more, and every page reads right, the zero ones too.
  for (uint64_t page = 0; page < pages; ++page) {
    ASSERT_EQ(served->read(page), expected_page(page)) << page;
  }
}

TEST_P(PageServerKindsTest, FillsWhileTheProcessReadsAndWrites) {
  auto [served, image, marks, uffd] = target(child(GetParam()));
  ServerThread server(uffd, *image, marks, served->ranges());
  for (uint64_t page = pages - 1; page > 100; page -= 13) served->write(page);
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  for (uint64_t page = 0; page < pages; ++page) {
    const bool written = page > 100 && (pages - 1 - page) % 13 == 0;
    ASSERT_EQ(served->read(page), written ? ServedChild::written_page() : expected_page(page))
        << page;
  }
}

TEST_F(PageServerTest, PagesOfSeveralRangesInAnyOrder) {
  auto [served, image, marks, uffd] = target(child(MemoryKind::anonymous, 1100));
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

TEST_F(PageServerTest, PagesThatWereThereAreOverwritten) {
  auto [served, image, marks, uffd] = target();
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
TEST_F(PageServerTest, ADamagedPageIsPoisonedAndTheOthersAreServed) {
  ASSERT_NO_FATAL_FAILURE(damage_page(path_, 301));
  for (const bool fill : {false, true}) {
    auto [served, image, marks, uffd] = target();
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
  auto [served, image, marks, uffd] = target();
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

}  // namespace
}  // namespace vmsnap::testing
