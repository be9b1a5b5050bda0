#include "restore/farm/farm_server.h"

#include <cerrno>
#include <random>
#include <thread>

#include "formats/log.h"
#include "tests/restore/served_child.h"

namespace vmsnap {
namespace {

using testing::expected_page;
using testing::is_zero_page;
using testing::Page;
using testing::ServedChild;

constexpr uint64_t pages = 600;

class FarmServerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::write_image(folder_ / "image", pages);
    renew_clones();
  }
  // Two clones, and memory that nobody has touched.
  void renew_clones() {
    end();  // no thread of ours may be there when they are forked
    clones_.clear();
    memory_ = std::make_unique<SharedMemory>(*SharedMemory::create(pages));
    for (size_t i = 0; i < 2; ++i) {
      const Fd fd = *memory_->open_for_clone();
      clones_.push_back(ServedChild::start_clone(pages, fd.get()));
      ASSERT_TRUE(clones_.back());
      std::filesystem::remove(marks_of(i));
    }
  }
  std::string marks_of(size_t number) const { return folder_ / ("pages" + std::to_string(number)); }
  void serve(FarmServerOptions options = {.prefetch = Prefetch::none, .threads = 4}, uint64_t limit = 0) {
    if (!image_) image_ = testing::open_image(folder_ / "image");
    cache_ = *PageCache::attach(*memory_, limit);
    server_ = std::make_unique<FarmServer>(*image_, *cache_, options);
    ASSERT_TRUE(server_->prepare());
    for (size_t i = 0; i < clones_.size(); ++i) add(i);
    ASSERT_TRUE(server_->start());
  }
  void add(size_t number) {
    const ServedChild& clone = *clones_[number];
    const std::string marks = marks_of(number);
    auto opened = std::filesystem::exists(marks) ? PageMarks::open(marks, pages)
                                                 : PageMarks::create(marks, pages);
    ASSERT_TRUE(opened);
    const Status added = server_->add({std::to_string(number), clone.take_uffd(),
                                       Fd(::dup(clone.process().pidfd())), *std::move(opened),
                                       clone.ranges()});
    ASSERT_TRUE(added) << added.error().message();
  }
  void end() {
    server_.reset();
    cache_.reset();
  }
  // Returns when the server has acted upon it.
  void give_back(size_t number, uint64_t page, uint64_t count) {
    const uint64_t before = of_clone(number)["removed"];
    clones_[number]->give_back(page, count);
    while (of_clone(number)["removed"] != before + count) std::this_thread::yield();
  }
  nlohmann::json of_clone(size_t number) const { return server_->status()["clones"][number]; }
  uint64_t total(const char* field) const { return server_->status()[field]; }

  testing::TemporaryDirectory folder_;
  std::unique_ptr<SharedMemory> memory_;
  std::vector<std::unique_ptr<ServedChild>> clones_;
  std::unique_ptr<ImageReader> image_;
  std::unique_ptr<PageCache> cache_;
  std::unique_ptr<FarmServer> server_;
};

TEST_F(FarmServerTest, ReadsAPageOnceForAll) {
  serve();
  for (auto& clone : clones_) {
    for (uint64_t page = 0; page < pages; ++page) EXPECT_EQ(clone->read(page), expected_page(page));
  }
  const uint64_t data = pages - image_->summary().zero_pages;
  EXPECT_EQ(total("read_pages"), data);
  EXPECT_EQ(total("resident_pages"), data);
  EXPECT_EQ(of_clone(1)["brought"], 0);
  EXPECT_EQ(of_clone(1)["found"], 0);
  // Zeros cost no memory, and one event for many of them.
  EXPECT_GT(of_clone(1)["zero"], 0);
  EXPECT_LE(of_clone(1)["zero"], pages / 16 + 1);
}

TEST_F(FarmServerTest, ManyThreadsOfManyClones) {
  serve();
  for (uint64_t page = 0; page < pages; ++page) {
    for (auto& clone : clones_) clone->begin_read(page);
  }
  for (auto& clone : clones_) {
    for (uint64_t page = 0; page < pages; ++page) {
      while (!clone->has_read(page)) std::this_thread::yield();
      EXPECT_EQ(clone->shown(page), expected_page(page)) << page;
    }
  }
  EXPECT_EQ(total("read_pages"), pages - image_->summary().zero_pages);
}

TEST_F(FarmServerTest, WhatOneWritesTheOtherDoesNotSee) {
  serve();
  for (uint64_t page = 0; page < 30; ++page) clones_[0]->write(page);
  for (uint64_t page = 0; page < 30; ++page) {
    EXPECT_EQ(clones_[1]->read(page), expected_page(page));
    EXPECT_EQ(clones_[0]->read(page), ServedChild::written_page());
  }
}

TEST_F(FarmServerTest, WhatOneGaveBackIsZeroForItAlone) {
  serve();
  for (uint64_t page = 0; page < 40; ++page) clones_[0]->read(page);
  clones_[0]->write(8);
  give_back(0, 5, 10);
  for (uint64_t page = 0; page < 40; ++page) {
    const bool gone = page >= 5 && page < 15;
    EXPECT_EQ(clones_[1]->read(page), expected_page(page)) << page;
    EXPECT_EQ(clones_[0]->read(page), gone ? Page{} : expected_page(page)) << page;
  }
  EXPECT_EQ(of_clone(0)["removed"], 10);
  EXPECT_GT(of_clone(1)["alone"], 0);
  // It can use them again.
  clones_[0]->write(6);
  EXPECT_EQ(clones_[0]->read(6), ServedChild::written_page());
}

TEST_F(FarmServerTest, ASuccessorKnowsWhatWasGivenBack) {
  serve();
  clones_[0]->read(7);
  give_back(0, 6, 3);
  end();
  serve({.prefetch = Prefetch::all, .threads = 4});
  EXPECT_EQ(clones_[0]->read(7), Page{});
  EXPECT_EQ(clones_[1]->read(7), expected_page(7));
  EXPECT_FALSE(cache_->contains(7));
}

TEST_F(FarmServerTest, WhoWaitsIsServedByTheSuccessor) {
  serve();
  clones_[0]->read(1);
  end();
  for (uint64_t page = 100; page < 140; ++page) clones_[0]->begin_read(page);
  serve();
  for (uint64_t page = 100; page < 140; ++page) {
    while (!clones_[0]->has_read(page)) std::this_thread::yield();
    EXPECT_EQ(clones_[0]->shown(page), expected_page(page));
  }
}

TEST_F(FarmServerTest, DroppedPagesComeBack) {
  serve({.prefetch = Prefetch::all, .threads = 4}, 16);
  for (int round = 0; round < 3; ++round) {
    for (auto& clone : clones_) {
      for (uint64_t page = 0; page < pages; page += 5) {
        EXPECT_EQ(clone->read(page), expected_page(page));
        EXPECT_LE(total("resident_pages"), 16U);
      }
    }
  }
  EXPECT_GT(total("dropped_pages"), 0U);
}

TEST_F(FarmServerTest, LoadsAheadWhatNobodyTouches) {
  serve({.prefetch = Prefetch::all, .threads = 4});
  while (!server_->status()["prefetch_done"].get<bool>()) std::this_thread::yield();
  EXPECT_EQ(total("resident_pages"), pages - image_->summary().zero_pages);
  for (uint64_t page = 0; page < pages; ++page) {
    EXPECT_EQ(clones_[1]->read(page), expected_page(page));
  }
  EXPECT_EQ(of_clone(1)["brought"], 0);
}

TEST_F(FarmServerTest, WhatCannotBeReadIsPoison) {
  testing::damage_page(folder_ / "image", 100);
  serve();
  EXPECT_EQ(clones_[0]->read(100), std::nullopt);
  EXPECT_EQ(clones_[1]->read(100), std::nullopt);
  EXPECT_EQ(clones_[1]->read(101), expected_page(101));
  EXPECT_EQ(of_clone(0)["poisoned"], 1);
}

TEST_F(FarmServerTest, WhatCannotBeReadNowIsWaitedFor) {
  std::atomic<int> error_number = ENOMEM;
  std::atomic<int> lines = 0;
  set_log_sink([&](LogLevel, std::string_view line) {
    EXPECT_NE(line.find("cannot open the pack"), std::string::npos) << line;
    ++lines;
  });
  image_ = testing::open_failing_image(folder_ / "image", error_number);
  serve({.prefetch = Prefetch::all, .threads = 2});
  for (auto& clone : clones_) {
    for (const uint64_t page : {100, 101, 103, 104}) clone->begin_read(page);
    EXPECT_EQ(clone->read(300), Page{}) << "a page of zeros, which needs no pack";
  }
  while (lines == 0) std::this_thread::yield();
  EXPECT_FALSE(clones_[0]->has_read(100));
  EXPECT_FALSE(server_->status()["prefetch_done"].get<bool>());
  error_number = 0;
  for (auto& clone : clones_) {
    for (const uint64_t page : {100, 101, 103, 104}) {
      while (!clone->has_read(page)) std::this_thread::yield();
      EXPECT_EQ(clone->shown(page), expected_page(page)) << page;
    }
  }
  while (!server_->status()["prefetch_done"].get<bool>()) std::this_thread::yield();
  EXPECT_EQ(total("resident_pages"), pages - image_->summary().zero_pages);
  EXPECT_EQ(of_clone(0)["poisoned"], 0);
  end();
  set_log_sink({});
  EXPECT_EQ(lines, 1);
}

// Reads, writes and pages given back, in any order, across page servers and
// with little room: each clone sees what it did itself, and else the image.
TEST_F(FarmServerTest, AnythingInAnyOrder) {
  for (unsigned seed = 1; seed <= 6; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto below = [&](uint64_t limit) { return random() % limit; };
    if (seed > 1) renew_clones();
    std::vector<std::vector<Page>> model(clones_.size());
    for (auto& memory : model) {
      for (uint64_t page = 0; page < pages; ++page) memory.push_back(expected_page(page));
    }
    serve({.prefetch = seed % 2 ? Prefetch::none : Prefetch::all, .threads = 3}, seed % 3 ? 0 : 24);
    for (int step = 0; step < 600; ++step) {
      const size_t clone = below(clones_.size());
      const uint64_t page = below(pages);
      switch (below(40)) {
        case 0: {
          const uint64_t count = 1 + below(std::min<uint64_t>(20, pages - page));
          give_back(clone, page, count);
          std::fill_n(model[clone].begin() + static_cast<std::ptrdiff_t>(page), count, Page{});
          break;
        }
        case 1:
          end();
          serve({.prefetch = Prefetch::none, .threads = 3}, seed % 3 ? 0 : 24);
          break;
        case 2: case 3: case 4: case 5: case 6:
          clones_[clone]->write(page);
          model[clone][page] = ServedChild::written_page();
          break;
        default:
          ASSERT_EQ(clones_[clone]->read(page), model[clone][page]) << clone << " " << page;
      }
    }
    for (size_t clone = 0; clone < clones_.size(); ++clone) {
      for (uint64_t page = 0; page < pages; ++page) {
        ASSERT_EQ(clones_[clone]->read(page), model[clone][page]) << clone << " " << page;
      }
    }
  }
}

TEST_F(FarmServerTest, TheEndOfOneIsNothingToTheOther) {
  serve();
  clones_[0]->read(1);
  clones_[0]->kill();
  while (server_->clones() > 1) std::this_thread::yield();
  EXPECT_EQ(clones_[1]->read(2), expected_page(2));
}

}  // namespace
}  // namespace vmsnap
