// Many faults at once, slow pages, and memory that changes in any order meanwhile.
#include <condition_variable>
#include <random>

#include "formats/image_file.h"
#include "tests/restore/server_thread.h"

namespace vmsnap::testing {
namespace {

// A disk on which reading takes as long as the test wants.
class SlowDisk : public FrameFiles {
 public:
  explicit SlowDisk(const FrameSource& source, const layout::ImageId& id) : frames_(source, id) {}

  Result<FrameSource> source(uint64_t pack) const override {
    std::unique_lock lock(mutex_);
    if (to_hold_ > 0) {
      --to_hold_;
      ++held_;
      changed_.notify_all();
      changed_.wait(lock, [&] { return released_; });
      --held_;
    }
    return frames_.source(pack);
  }
  Result<layout::ImageId> file_id(uint64_t pack) const override { return frames_.file_id(pack); }

  // The next `reads` do not return before release().
  void hold(int reads) {
    std::lock_guard lock(mutex_);
    to_hold_ = reads;
    released_ = false;
  }
  void wait_until_held(int reads) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60), [&] { return held_ >= reads; }));
  }
  void release() {
    std::lock_guard lock(mutex_);
    to_hold_ = 0;
    released_ = true;
    changed_.notify_all();
  }

 private:
  const OwnFrames frames_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  mutable int to_hold_ = 0, held_ = 0;
  bool released_ = true;
};

class PageOrderTest : public PageServerTest {
 protected:
  // `disk_` is the image's for as long as the image lives.
  std::unique_ptr<ImageReader> open_slow() {
    ImageFile file = *ImageFile::open(path_);
    auto disk = std::make_unique<SlowDisk>(file.own_frames(), file.header().id);
    disk_ = disk.get();
    return *ImageReader::open(std::move(file), std::move(disk));
  }
  SlowDisk* disk_ = nullptr;
};

TEST_F(PageOrderTest, SlowPagesHoldUpNobodyElse) {
  auto [served, image, marks, uffd] = target(open_slow());
  ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
  disk_->hold(3);
  for (const uint64_t page : {100, 101, 103}) served->begin_read(page);
  disk_->wait_until_held(3);
  for (uint64_t page = 200; page < 300; ++page) {
    EXPECT_EQ(served->read(page), expected_page(page)) << page;
  }
  served->give_back(300, 4);
  EXPECT_EQ(served->read(301), Page{});
  for (const uint64_t page : {100, 101, 103}) EXPECT_FALSE(served->has_read(page));
  disk_->release();
  wait_until(
      [&] { return served->has_read(100) && served->has_read(101) && served->has_read(103); });
  for (const uint64_t page : {100, 101, 103}) {
    EXPECT_EQ(served->shown(page), expected_page(page)) << page;
  }
}

TEST_F(PageOrderTest, APageThatIsGivenBackWhileItIsReadIsZero) {
  auto [served, image, marks, uffd] = target(open_slow());
  ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
  disk_->hold(1);
  served->begin_read(100);
  disk_->wait_until_held(1);
  served->give_back(100, 1);  // returns when the removal was read, and is done
  disk_->release();
  wait_until([&] { return served->has_read(100); });
  EXPECT_EQ(served->shown(100), Page{});
  EXPECT_EQ(served->read(101), expected_page(101));
}

TEST_F(PageOrderTest, TheFillDoesNotBringBackWhatWasGivenBackWhileItWasRead) {
  auto [served, image, marks, uffd] = target(open_slow());
  disk_->hold(1);
  PageServerOptions options;
  options.decoder_threads = 1;
  ServerThread server(uffd, *image, marks, served->ranges(), options);
  disk_->wait_until_held(1);
  served->give_back(1, 9);
  disk_->release();
  EXPECT_EQ(server.wait(), ServeEnd::filled);
  for (uint64_t page = 0; page < 20; ++page) {
    EXPECT_EQ(served->read(page), page >= 1 && page < 10 ? Page{} : expected_page(page)) << page;
  }
}

// What a page may hold.
enum class Content { image, zero, image_or_zero, written, unmapped };

// One child that does things in a random order, several threads of it at once,
// served by one server after the other.
class RandomOrder {
 public:
  RandomOrder(ServedChild& child, uint64_t pages, unsigned seed)
      : child_(child), random_(seed), contents_(pages, Content::image) {}

  void step() {
    const uint64_t page = below(contents_.size());
    const uint64_t count = std::min<uint64_t>(1 + below(12), contents_.size() - page);
    switch (below(16)) {
      case 0:
        change(page, count, Content::zero, [&] { child_.give_back(page, count); });
        break;
      case 1:
        change(page, count, Content::unmapped, [&] { child_.unmap(page, count); });
        break;
      case 2:
        unregister(page, count);
        break;
      case 3:
        change(page, 1, Content::written, [&] { child_.write(page); });
        break;
      case 4:
      case 5:
      case 6:
        if (mapped(page, 1)) child_.begin_read(page);
        break;
      default:
        check(page);
    }
  }
  void check(uint64_t page) {
    if (!mapped(page, 1)) return;
    const std::optional<Page> bytes = child_.read(page);
    ASSERT_TRUE(bytes) << page;
    const bool image = *bytes == expected_page(page), zero = *bytes == Page{};
    switch (contents_[page]) {
      case Content::image:
        EXPECT_TRUE(image) << page;
        break;
      case Content::zero:
        EXPECT_TRUE(zero) << page;
        break;
      case Content::image_or_zero:
        EXPECT_TRUE(image || zero) << page;
        break;
      default:
        EXPECT_EQ(*bytes, ServedChild::written_page()) << page;
    }
  }
  uint64_t below(uint64_t limit) { return random_() % limit; }

 private:
  bool mapped(uint64_t page, uint64_t count) const {
    return std::none_of(contents_.begin() + static_cast<ptrdiff_t>(page),
                        contents_.begin() + static_cast<ptrdiff_t>(page + count),
                        [](Content content) { return content == Content::unmapped; });
  }
  template <class Do>
  void change(uint64_t page, uint64_t count, Content to, Do what) {
    if (!mapped(page, count)) return;
    what();
    std::fill_n(contents_.begin() + static_cast<ptrdiff_t>(page), count, to);
  }
  // Whether the page was there by then is not known, but for what it says.
  void unregister(uint64_t page, uint64_t count) {
    if (!mapped(page, count)) return;
    child_.unregister(page, count);
    for (uint64_t i = page; i < page + count; ++i) {
      if (contents_[i] == Content::image) contents_[i] = Content::image_or_zero;
    }
  }

  ServedChild& child_;
  std::mt19937 random_;
  std::vector<Content> contents_;
};

class PageRandomOrderTest : public PageServerTest,
                            public ::testing::WithParamInterface<unsigned> {};

INSTANTIATE_TEST_SUITE_P(Seeds, PageRandomOrderTest, ::testing::Range(1u, 9u));

TEST_P(PageRandomOrderTest, EveryPageHoldsWhatItMust) {
  const unsigned seed = GetParam();
  const MemoryKind kind = seed % 2 ? MemoryKind::anonymous : MemoryKind::shared;
  const auto served = ServedChild::start(pages, kind, {.unmap_events = seed % 4 < 2});
  ASSERT_TRUE(served);
  const auto image = open_image(path_);
  auto marks = *PageMarks::in_memory(pages);
  const Uffd uffd = served->take_uffd();
  RandomOrder order(*served, pages, seed);
  for (int server_number = 0; server_number < 4; ++server_number) {
    PageServerOptions options;
    options.release = false;
    options.prefetch = server_number == 2 ? Prefetch::all : Prefetch::none;
    ServerThread server(uffd, *image, marks, served->ranges(), options);
    const uint64_t steps = 300 + order.below(200);
    for (uint64_t i = 0; i < steps && !HasFatalFailure(); ++i) order.step();
  }
  ServerThread server(uffd, *image, marks, served->ranges(), no_fill());
  for (uint64_t page = 0; page < pages && !HasFatalFailure(); ++page) order.check(page);
}

}  // namespace
}  // namespace vmsnap::testing
