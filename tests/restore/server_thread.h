// A page server for a served child, in a thread; what its tests have in common.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "formats/file.h"
#include "restore/page_server.h"
#include "tests/restore/served_child.h"
#include "tests/restore/test_image.h"

namespace vmsnap::testing {

template <class Condition>
void wait_until(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    ASSERT_LT(std::chrono::steady_clock::now(), end) << "waited in vain";
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// A page server for one child, in a thread.
class ServerThread {
 public:
  ServerThread(const Uffd& uffd, const ImageReader& image, PageMarks& marks,
               std::vector<ServedRange> ranges, PageServerOptions options = {})
      : server_(uffd, image, marks, std::move(ranges), std::move(options)),
        thread_([this] { end_ = server_.serve(); }) {}
  ~ServerThread() {
    server_.stop();
    if (thread_.joinable()) thread_.join();
  }
  PageServer& operator*() { return server_; }
  PageServer* operator->() { return &server_; }
  ServeEnd wait() {
    if (thread_.joinable()) thread_.join();
    EXPECT_TRUE(end_ && *end_) << (end_ ? end_->error().message() : "");
    return end_ && *end_ ? **end_ : ServeEnd::stopped;
  }
  ServeEnd stop() {
    server_.stop();
    return wait();
  }

 private:
  PageServer server_;
  std::optional<Result<ServeEnd>> end_;
  std::thread thread_;
};

// A small image, and children that are served from it.
class PageServerTest : public ::testing::Test {
 protected:
  static constexpr uint64_t pages = 1200;  // more than two extents, the last one not whole

  void SetUp() override { ASSERT_NO_FATAL_FAILURE(write_image(path_, pages)); }

  std::unique_ptr<ServedChild> child(MemoryKind kind = MemoryKind::anonymous,
                                     uint64_t count = pages) {
    return ServedChild::start(count, kind);
  }
  // A child, and what a page server of it needs.
  struct Target {
    std::unique_ptr<ServedChild> served;
    std::unique_ptr<ImageReader> image;
    PageMarks marks;
    Uffd uffd;
  };
  Target target(std::unique_ptr<ServedChild> served, std::unique_ptr<ImageReader> image) const {
    if (!served) {
      ADD_FAILURE() << "there is no child";
      std::abort();
    }
    Uffd uffd = served->take_uffd();
    return {std::move(served), std::move(image), *PageMarks::in_memory(pages), std::move(uffd)};
  }
  Target target(std::unique_ptr<ServedChild> served) {
    return target(std::move(served), open_image(path_));
  }
  Target target(std::unique_ptr<ImageReader> image) { return target(child(), std::move(image)); }
  Target target() { return target(child()); }

  static PageServerOptions no_fill() {
    PageServerOptions options;
    options.prefetch = Prefetch::none;
    return options;
  }

  TemporaryDirectory directory_;
  const std::string path_ = directory_ / "small.img";
};

// Two huge pages are enough; they are taken from the pool for the test's time.
class HugePages {
 public:
  HugePages() : before_(*read_small_file(path)) { set("8"); }
  ~HugePages() { set(before_); }

 private:
  static constexpr const char* path = "/proc/sys/vm/nr_hugepages";
  static void set(const std::string& value) {
    if (auto fd = open_file(path, O_WRONLY))
      (void)write_all(fd->get(), std::as_bytes(std::span(value)), path);
  }
  std::string before_;
};

}  // namespace vmsnap::testing
