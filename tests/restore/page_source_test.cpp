#include "restore/page_source.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <set>

#include "tests/restore/test_image.h"

namespace vmsnap::testing {
namespace {

// The first page of each extent, in the order in which they come.
std::vector<uint64_t> extents(const ImageReader& image, const std::vector<ServedRange>& ranges) {
  const PageMarks marks = *PageMarks::in_memory(image.page_count());
  const auto source = *PageSource::start(image, marks, ranges, 1);
  std::vector<uint64_t> found;
  while (!source->exhausted()) {
    pollfd ready = {source->ready_fd(), POLLIN, 0};
    ::poll(&ready, 1, 1000);
    while (DecodedExtent* extent = source->take()) {
      found.push_back(extent->first_page);
      source->give_back(extent);
    }
  }
  return found;
}

TEST(PageSource, BeginsWithTheWorkingSetAndLeavesNothingOut) {
  const std::string path = ::testing::TempDir() + "vmsnap-page-source.img";
  const uint64_t pages = 4 * DecodedExtent::max_pages;
  write_image(path, pages, {{"kind", "process"}}, {}, {1100, 1030, 1600, 1101});
  const auto image = open_image(path);
  const std::vector<ServedRange> one = {
      {.range = {RemotePtr(0x100000), pages * page_size}, .first_page = 0, .name = "a"}};
  EXPECT_EQ(extents(*image, one), (std::vector<uint64_t>{1024, 1536, 0, 512}));

  write_image(path, pages);
  EXPECT_EQ(extents(*open_image(path), one), (std::vector<uint64_t>{0, 512, 1024, 1536}));
  ::unlink(path.c_str());
}

}  // namespace
}  // namespace vmsnap::testing
