#include "restore/farm/page_cache.h"

#include <sys/mman.h>

#include <thread>

#include "restore/farm/in_flight.h"
#include "tests/restore/test_image.h"

namespace vmsnap {
namespace {

using testing::expected_page;
using testing::Page;

class PageCacheTest : public ::testing::Test {
 protected:
  void make(uint64_t pages, uint64_t limit = 0) {
    memory_ = std::make_unique<SharedMemory>(*SharedMemory::create(pages));
    attach(limit);
  }
  void attach(uint64_t limit) {
    auto cache = PageCache::attach(*memory_, limit);
    ASSERT_TRUE(cache) << cache.error().message();
    cache_ = *std::move(cache);
  }
  void put(uint64_t page) {
    const auto put = cache_->put(page, expected_page(page));
    ASSERT_TRUE(put) << put.error().message();
    ASSERT_EQ(*put, PageCache::Put::done);
  }
  Page in_file(uint64_t page) const {
    Page bytes;
    EXPECT_TRUE(read_exact_at(memory_->fd(), bytes, page * page_size, "memory"));
    return bytes;
  }

  std::unique_ptr<SharedMemory> memory_;
  std::unique_ptr<PageCache> cache_;
};

TEST_F(PageCacheTest, HoldsWhatWasPut) {
  make(64);
  EXPECT_FALSE(cache_->contains(7));
  put(7);
  EXPECT_TRUE(cache_->contains(7));
  EXPECT_EQ(in_file(7), expected_page(7));
  EXPECT_FALSE(cache_->contains(6));
  EXPECT_FALSE(cache_->contains(8));
  EXPECT_EQ(cache_->resident(), 1U);
  // Whoever was first, was first.
  Page other;
  other.fill(std::byte{1});
  EXPECT_EQ(*cache_->put(7, other), PageCache::Put::done);
  EXPECT_EQ(in_file(7), expected_page(7));
}

TEST_F(PageCacheTest, PutsSeveralAroundWhatIsThereOrNotShared) {
  make(16);
  put(3);
  ASSERT_TRUE(cache_->unshare(5, 2));
  std::vector<std::byte> bytes;
  for (uint64_t page = 0; page < 16; ++page) {
    const Page one = expected_page(page + 100);
    bytes.insert(bytes.end(), one.begin(), one.end());
  }
  EXPECT_EQ(*cache_->put(0, bytes), PageCache::Put::done);
  for (uint64_t page = 0; page < 16; ++page) {
    const bool out = page == 5 || page == 6;
    EXPECT_EQ(cache_->contains(page), !out) << page;
    if (!out) EXPECT_EQ(in_file(page), expected_page(page == 3 ? 3 : page + 100)) << page;
  }
}

TEST_F(PageCacheTest, WhatIsNotSharedNeverComesBack) {
  make(16);
  put(1);
  put(4);
  ASSERT_TRUE(cache_->unshare(4, 3));
  EXPECT_FALSE(cache_->contains(4));
  EXPECT_TRUE(cache_->contains(1));
  EXPECT_FALSE(cache_->is_shared(6));
  EXPECT_TRUE(cache_->is_shared(7));
  EXPECT_EQ(*cache_->put(4, expected_page(4)), PageCache::Put::not_shared);
  EXPECT_FALSE(cache_->contains(4));
}

TEST_F(PageCacheTest, StaysUnderItsLimit) {
  make(256, 32);
  for (uint64_t page = 0; page < 256; ++page) {
    put(page);
    EXPECT_LE(cache_->resident(), 32U);
    EXPECT_TRUE(cache_->contains(page));
  }
  EXPECT_EQ(cache_->dropped(), 256U - 32);
  EXPECT_EQ(cache_->room(), 0U);
}

TEST_F(PageCacheTest, KeepsWhatCameBackLongerThanWhatIsNew) {
  make(1024, 32);
  for (uint64_t page = 0; page < 64; ++page) put(page);
  for (uint64_t page = 0; page < 16; ++page) put(page);  // dropped before, wanted again
  for (uint64_t page = 200; page < 400; ++page) put(page);  // one pass over much that is new
  for (uint64_t page = 0; page < 16; ++page) EXPECT_TRUE(cache_->contains(page)) << page;
}

TEST_F(PageCacheTest, ASuccessorFindsWhatIsThere) {
  make(256, 64);
  for (uint64_t page = 10; page < 20; ++page) put(page);
  put(100);
  attach(16);
  EXPECT_EQ(cache_->present(), (std::vector<std::pair<uint64_t, uint64_t>>{{10, 10}, {100, 1}}));
  for (uint64_t page = 150; page < 170; ++page) put(page);
  EXPECT_LE(cache_->resident(), 16U);
}

// A reader of a private mapping sees whole pages or, before they were put,
// zeros: but never a part of one. (Without a userfaultfd of its own, so a page
// that it touches too early stays zero in the file.)
TEST_F(PageCacheTest, PagesAppearWhole) {
  constexpr uint64_t pages = 2048;
  make(pages);
  const Fd fd = *memory_->open_for_clone();
  auto* mapping = static_cast<std::byte*>(
      ::mmap(nullptr, pages * page_size, PROT_READ, MAP_PRIVATE, fd.get(), 0));
  ASSERT_NE(mapping, MAP_FAILED);
  std::atomic<uint64_t> next = 0;
  std::thread reader([&] {
    for (uint64_t seen = 0; seen < pages;) {
      if (next.load() <= seen) continue;
      const Page want = expected_page(seen * 3 + 1);
      EXPECT_EQ(std::memcmp(mapping + seen * page_size, want.data(), page_size), 0) << seen;
      ++seen;
    }
  });
  for (uint64_t page = 0; page < pages; ++page) {
    ASSERT_EQ(*cache_->put(page, expected_page(page * 3 + 1)), PageCache::Put::done);
    next.store(page + 1);
  }
  reader.join();
  ::munmap(mapping, pages * page_size);
}

TEST_F(PageCacheTest, ACloneCannotWrite) {
  make(4);
  put(1);
  const Fd fd = *memory_->open_for_clone();
  EXPECT_EQ(::write(fd.get(), "x", 1), -1);
  EXPECT_EQ(::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
  EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0), MAP_FAILED);
  EXPECT_EQ(::ftruncate(memory_->fd(), 0), -1);
}

TEST(InFlight, OneReadsTheOthersWait) {
  InFlight<int> pages;
  EXPECT_TRUE(pages.begin(5, 1));
  EXPECT_FALSE(pages.begin(5, 2));
  EXPECT_FALSE(pages.begin(5, 3));
  EXPECT_FALSE(pages.begin(5));
  EXPECT_TRUE(pages.begin(6));
  EXPECT_EQ(pages.end(5), (std::vector<int>{2, 3}));
  EXPECT_TRUE(pages.end(6).empty());
  EXPECT_TRUE(pages.begin(5, 4));
}

}  // namespace
}  // namespace vmsnap
