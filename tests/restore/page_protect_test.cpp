// Pages that arrive write-protected.
#include "formats/log.h"
#include "tests/restore/server_thread.h"

namespace vmsnap::testing {
namespace {

class PageProtectTest : public PageServerTest {
 protected:
  static PageServerOptions protecting(Prefetch prefetch) {
    PageServerOptions options;
    options.prefetch = prefetch;
    options.write_protect = true;
    options.release = false;
    return options;
  }

  // proc_pid_pagemap(5): bit 57, and bit 63 for a page that is there.
  static bool is_protected(const ServedChild& child, uint64_t page) {
    const std::string path = fmt::format("/proc/{}/pagemap", child.process().pid());
    const Fd fd = *open_file(path, O_RDONLY);
    uint64_t entry = 0;
    const uint64_t at = child.ranges()[0].address_of(page).address() / page_size * sizeof entry;
    EXPECT_TRUE(read_exact_at(fd.get(), std::as_writable_bytes(std::span(&entry, 1)), at, path));
    EXPECT_TRUE(entry >> 63 & 1) << "page " << page << " is not there";
    return entry >> 57 & 1;
  }
};

TEST_F(PageProtectTest, PagesHaveTheMarkUntilTheyAreWritten) {
  for (const MemoryKind kind : {MemoryKind::anonymous, MemoryKind::shared}) {
    const auto served = ServedChild::start(pages, kind, {.write_protect = true});
    ASSERT_TRUE(served);
    const auto image = open_image(path_);
    auto marks = *PageMarks::in_memory(pages);
    const Uffd uffd = served->take_uffd();
    ServerThread server(uffd, *image, marks, served->ranges(), protecting(Prefetch::none));
    for (const uint64_t page : {10, 11, 12, 13}) {  // 12 is zero in the image
      EXPECT_EQ(served->read(page), expected_page(page));
      EXPECT_TRUE(is_protected(*served, page)) << page;
    }
    served->give_back(13, 1);
    EXPECT_EQ(served->read(13), Page{});
    EXPECT_TRUE(is_protected(*served, 13));
    for (const uint64_t page : {11, 12}) {
      served->write(page);
      EXPECT_EQ(served->read(page), ServedChild::written_page());
      EXPECT_FALSE(is_protected(*served, page)) << page;
    }
    EXPECT_TRUE(is_protected(*served, 10));
  }
}

TEST_F(PageProtectTest, PagesOfTheBackgroundHaveIt) {
  const auto served = ServedChild::start(pages, MemoryKind::anonymous, {.write_protect = true});
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  ServerThread server(uffd, *image, marks, served->ranges(), protecting(Prefetch::all));
  wait_until([&] { return server->counters().filled() == server->counters().data_pages; });
  for (const uint64_t page : {1, 500, 1199}) EXPECT_TRUE(is_protected(*served, page)) << page;
}

TEST_F(PageProtectTest, HugePagesHaveIt) {
  const HugePages pool;
  const auto served = ServedChild::start(1024, MemoryKind::huge, {.write_protect = true});
  if (!served) GTEST_SKIP() << "no huge pages are free";
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  ServerThread server(uffd, *image, marks, served->ranges(), protecting(Prefetch::none));
  EXPECT_EQ(served->read(700), expected_page(700));
  EXPECT_TRUE(is_protected(*served, 700));
  served->write(701);
  EXPECT_EQ(served->read(701), ServedChild::written_page());
  EXPECT_EQ(served->read(700), expected_page(700));
  EXPECT_FALSE(is_protected(*served, 700));
}

TEST_F(PageProtectTest, WithoutTheRegistrationPagesArriveWithout) {
  std::string log;
  set_log_sink([&](LogLevel, std::string_view line) { log += line; });
  {
    auto [served, image, marks, uffd] = target();
    ServerThread server(uffd, *image, marks, served->ranges(), protecting(Prefetch::none));
    for (const uint64_t page : {10, 12, 500}) EXPECT_EQ(served->read(page), expected_page(page));
    EXPECT_FALSE(is_protected(*served, 10));
  }
  set_log_sink({});
  EXPECT_EQ(log,
            "the VM: range0 is not registered for write protection (UFFDIO_REGISTER_MODE_WP); its "
            "pages arrive without");
}

}  // namespace
}  // namespace vmsnap::testing
