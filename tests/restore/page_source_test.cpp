#include "restore/page_source.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <numeric>

#include "formats/file.h"
#include "formats/log.h"
#include "formats/store/recorded_working_set.h"
#include "tests/restore/test_image.h"

namespace vmsnap::testing {
namespace {

// First page and length of each extent, in the order in which they come.
using Extents = std::vector<std::pair<uint64_t, uint64_t>>;
Extents extents(const ImageReader& image, const std::vector<ServedRange>& ranges,
                Prefetch prefetch) {
  const PageMarks marks = *PageMarks::in_memory(image.page_count());
  const auto source = *PageSource::start(image, marks, ranges, prefetch, 1);
  Extents found;
  while (!source->exhausted()) {
    pollfd ready = {source->ready_fd(), POLLIN, 0};
    ::poll(&ready, 1, 1000);
    while (DecodedExtent* extent = source->take()) {
      found.emplace_back(extent->first_page, extent->pages);
      source->give_back(extent);
    }
  }
  return found;
}

class PageSourceTest : public ::testing::Test {
 protected:
  static constexpr uint64_t pages = 4 * DecodedExtent::max_pages;
  std::vector<ServedRange> one_range(uint64_t unit = page_size) const {
    return {{{RemotePtr(0x200000), pages * page_size}, 0, unit, "a"}};
  }
  void write(const std::vector<uint64_t>& working_set) {
    write_image(path_, pages, {{"kind", "process"}}, {}, working_set);
  }

  TemporaryDirectory directory_;
  const std::string path_ = directory_ / "a.img";
};

TEST_F(PageSourceTest, BeginsWithTheWorkingSetAndLeavesNothingOut) {
  write({1100, 1030, 1600, 1101});
  const Extents all = {{1100, 2},  {1030, 1},   {1600, 1},  {0, 512},
                       {512, 512}, {1024, 512}, {1536, 512}};
  EXPECT_EQ(extents(*open_image(path_), one_range(), Prefetch::all), all);
  write({});
  EXPECT_EQ(extents(*open_image(path_), one_range(), Prefetch::all),
            (Extents{{0, 512}, {512, 512}, {1024, 512}, {1536, 512}}));
}

TEST_F(PageSourceTest, OfTheWorkingSetAloneOnlyItsPages) {
  // Two neighbours that are asked for at different times, and two far apart.
  write({1100, 700, 1116, 717, 30});
  EXPECT_EQ(extents(*open_image(path_), one_range(), Prefetch::working_set),
            (Extents{{1100, 17}, {700, 1}, {717, 1}, {30, 1}}));
  write({});
  EXPECT_EQ(extents(*open_image(path_), one_range(), Prefetch::working_set), Extents());
}

TEST_F(PageSourceTest, ALongRunIsCutIntoExtents) {
  std::vector<uint64_t> run(600);
  std::iota(run.begin(), run.end(), 100);
  write(run);
  EXPECT_EQ(extents(*open_image(path_), one_range(), Prefetch::working_set),
            (Extents{{100, 512}, {612, 88}}));
}

TEST_F(PageSourceTest, HugePagesComeWhole) {
  write({1700, 1100});
  EXPECT_EQ(extents(*open_image(path_), one_range(2 << 20), Prefetch::working_set),
            (Extents{{1536, 512}, {1024, 512}}));
}

TEST_F(PageSourceTest, WhatARestoreRecordedComesFirst) {
  write({1100});
  const auto image = open_image(path_);
  ASSERT_TRUE(save_working_set(*image, std::vector<uint64_t>{40, 20}));
  const Extents recorded = {{40, 1}, {20, 1}};
  EXPECT_EQ(extents(*image, one_range(), Prefetch::working_set), recorded);
}

TEST_F(PageSourceTest, ADamagedRecordIsAWarningAndTheImagesOwnIsUsed) {
  write({1100});
  const auto image = open_image(path_);
  ASSERT_EQ(working_set_path(*image), path_ + ".working-set");
  ASSERT_TRUE(save_working_set(*image, std::vector<uint64_t>{40, 20}));
  std::string bytes = *read_small_file(path_ + ".working-set");
  bytes[70] ^= 1;
  ASSERT_TRUE(write_small_file(path_ + ".working-set", bytes));
  std::string log;
  set_log_sink([&](LogLevel, std::string_view line) { log = line; });
  EXPECT_EQ(*best_working_set(*image), std::vector<uint64_t>{1100});
  set_log_sink({});
  EXPECT_EQ(log, path_ + ".working-set cannot be used: the checksum of its pages is wrong");
}

}  // namespace
}  // namespace vmsnap::testing
