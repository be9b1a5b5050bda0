// The capture engine on memory of other kinds than capture_test.cpp's, and on
// memory that is given back under it.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>

#include "formats/image_reader.h"
#include "snap/capture.h"
#include "snap/vmm/handover.h"
#include "snap/vmm/pagemap.h"
#include "snap/vmm/thread_stop.h"
#include "tests/snap/victim.h"

namespace vmsnap {
namespace {

using namespace std::chrono_literals;

// A capture of all of `range` that has had its instant.
class ArmedCapture {
 public:
  // `before_instant`: what happens while all is armed ahead.
  ArmedCapture(const Process& process, RemoteRange range, CaptureOptions options = {},
               const std::function<void()>& before_instant = [] {})
      : memory_(*map_guest_memory(process, {{.name = "ram", .range = range, .address = 0, .first_page = 0}})),
        writer_(*ImageWriter::create(file_.get(), "image", range.length / page_size)) {
    auto handed = bring_out_uffd(process, nullptr, capture_features(memory_), KeepInVmm::no);
    EXPECT_TRUE(handed) << handed.error().message();
    capture_ = *Capture::create(process, memory_, std::move(handed->uffd), *writer_, std::move(options));
    EXPECT_TRUE(capture_->begin([] { return Status(); }));
    before_instant();
    const ThreadStop stopped = *ThreadStop::stop(process);
    EXPECT_TRUE(capture_->arm());
  }

  Status finish() {
    capture_->start();
    return capture_->finish([] { return Status(); });
  }
  const CaptureCounters& counters() const { return capture_->counters(); }

  std::unique_ptr<ImageReader> image() {
    ImageInfo info;
    info.regions = memory_.regions();
    EXPECT_TRUE(writer_->finish(info, {}));
    return *ImageReader::open(fmt::format("/proc/self/fd/{}", file_.get()));
  }

 private:
  GuestMemory memory_;
  const Fd file_{::memfd_create("image", 0)};
  std::unique_ptr<ImageWriter> writer_;
  std::unique_ptr<Capture> capture_;
};

// A private mapping of a file: some pages are the process's own, some the file's,
// and some nobody's.
struct PrivateTalk {
  std::atomic<uint64_t> address{0};
  std::atomic<bool> discard{false}, discarded{false};
};

class PrivateFileTest : public ::testing::Test {
 protected:
  static constexpr uint64_t own_pages = 100, file_pages = 200, total = 1000;

  static int live(PrivateTalk* talk) {
    const int fd = ::memfd_create("victim", 0);
    const std::string file(file_pages * page_size, 'f');
    if (::write(fd, file.data(), file.size()) != static_cast<ssize_t>(file.size())) return 1;
    if (::ftruncate(fd, total * page_size) != 0) return 1;
    void* memory = ::mmap(nullptr, total * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (memory == MAP_FAILED) return 1;
    std::memset(memory, 'o', own_pages * page_size);
    talk->address = reinterpret_cast<uint64_t>(memory);
    for (;;) {
      std::this_thread::sleep_for(1ms);
      if (!talk->discard || talk->discarded) continue;
      ::madvise(memory, page_size, MADV_DONTNEED);
      talk->discarded = true;
    }
  }

  void SetUp() override {
    ASSERT_TRUE(becomes_true([&] { return talk_->address != 0; }));
    capture_ = std::make_unique<ArmedCapture>(process_, RemoteRange{RemotePtr(talk_->address), total * page_size},
                                              CaptureOptions{.staging_bytes = 8 << 20});
  }

  PrivateTalk* const talk_ = shared_with_victim<PrivateTalk>();
  Victim victim_{[this] { return live(talk_); }};
  const Process process_ = victim_.process();
  std::unique_ptr<ArmedCapture> capture_;
};

TEST_F(PrivateFileTest, IsCapturedAndItsHolesStayHoles) {
  const std::string resident = *process_.status_field("RssShmem");
  const Status finished = capture_->finish();
  ASSERT_TRUE(finished) << finished.error().message();
  EXPECT_EQ(*process_.status_field("RssShmem"), resident);
  EXPECT_EQ(capture_->counters().armed_pages, file_pages);
  const auto image = capture_->image();
  std::array<std::byte, page_size> page;
  for (uint64_t number = 0; number < total; ++number) {
    const char expected = number < own_pages ? 'o' : number < file_pages ? 'f' : '\0';
    ASSERT_TRUE(image->read_page(number, page));
    EXPECT_TRUE(std::ranges::all_of(page, [&](std::byte b) { return b == std::byte(expected); })) << number;
  }
}

// The mark stays, on nothing, and the file's page shines through.
TEST_F(PrivateFileTest, APageOfItsOwnThatWasDiscardedIsMissed) {
  talk_->discard = true;
  ASSERT_TRUE(becomes_true([&] { return talk_->discarded.load(); }));
  const Status finished = capture_->finish();
  ASSERT_FALSE(finished);
  EXPECT_EQ(finished.error().code(), ErrorCode::discarded);
}

// Shared memory that was allocated, but nobody has touched: a hole to who asks the
// file for data, and yet a write to it raises no missing fault.
struct Allocated {
  std::atomic<uint64_t> address{0};
  std::atomic<bool> write{false}, written{false};
};

TEST(AllocatedMemory, AFirstWriteWhileArmingIsOfTheImage) {
  constexpr uint64_t total = 1000, written = 555;
  Allocated* talk = shared_with_victim<Allocated>();
  Victim victim([&] {
    const int fd = ::memfd_create("victim", 0);
    if (::fallocate(fd, 0, 0, total * page_size) != 0) return 1;
    void* mapped = ::mmap(nullptr, total * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) return 1;
    char* memory = static_cast<char*>(mapped);
    memory[0] = 'a';
    talk->address = reinterpret_cast<uint64_t>(memory);
    while (!talk->write) ::usleep(1000);
    memory[written * page_size] = 'b';
    talk->written = true;
    ::pause();
    return 0;
  });
  ASSERT_TRUE(becomes_true([&] { return talk->address != 0; }));
  const Process process = victim.process();
  ArmedCapture capture(process, {RemotePtr(talk->address), total * page_size}, {}, [&] {
    talk->write = true;
    EXPECT_TRUE(becomes_true([&] { return talk->written.load(); }));
  });
  const Status finished = capture.finish();
  ASSERT_TRUE(finished) << finished.error().message();
  const auto image = capture.image();
  std::array<std::byte, page_size> page;
  ASSERT_TRUE(image->read_page(0, page));
  EXPECT_EQ(page[0], std::byte{'a'});
  ASSERT_TRUE(image->read_page(written, page));
  EXPECT_EQ(page[0], std::byte{'b'});
}

// Huge pages that are written to all the time.
struct Huge {
  std::atomic<uint64_t> address{0};
  std::atomic<uint64_t> passes{0};
};

class HugePagesTest : public ::testing::TestWithParam<bool> {};

TEST_P(HugePagesTest, AreHugeAfterTenSnapshots) {
  constexpr uint64_t huge = 2 << 20, total = 16 * huge;
  Huge* talk = shared_with_victim<Huge>();
  Victim victim([&] {
    char* memory = map_for_huge_pages(total);
    if (!memory) return 1;
    ::madvise(memory, total, MADV_HUGEPAGE);
    volatile char* bytes_of = memory;
    for (;;) {
      for (uint64_t at = 0; at < total; at += 5 * page_size) bytes_of[at] = bytes_of[at] + 1;
      ++talk->passes;
      talk->address = reinterpret_cast<uint64_t>(memory);
    }
    return 0;
  });
  while (talk->passes < 3) std::this_thread::sleep_for(1ms);
  const Process process = victim.process();
  const RemoteRange range = {RemotePtr(talk->address), total};
  const PageMap map = *PageMap::open(process);
  const auto huge_bytes = [&] {
    uint64_t sum = 0;
    const std::vector<RemoteRange> runs = *map.huge(range);
    for (const RemoteRange& run : runs) sum += run.length;
    return sum;
  };
  if (huge_bytes() == 0) GTEST_SKIP() << "this host gives no transparent huge pages";
  const uint64_t before = huge_bytes();
  uint64_t split = 0, mended = 0;
  for (int round = 0; round < 10; ++round) {
    CaptureOptions options;
    options.keep_huge_pages = GetParam();
    ArmedCapture capture(process, range, std::move(options));
    const Status finished = capture.finish();
    ASSERT_TRUE(finished) << finished.error().message();
    split += capture.counters().split_huge_pages;
    mended += capture.counters().mended_huge_pages;
  }
  EXPECT_GE(huge_bytes() * 100, before * 95);
  if (!GetParam()) {
    EXPECT_GT(split, 0u);
    EXPECT_GT(mended, 0u);
  }
}

INSTANTIATE_TEST_SUITE_P(Manner, HugePagesTest, ::testing::Values(true, false),
                         [](const auto& keep) { return keep.param ? "keep" : "split"; });

// The quiet victim: nothing is written by it, so what is discarded is certain
// not to have been copied.
struct Quiet {
  std::atomic<uint64_t> address{0};
  std::atomic<int> discard{0};  // 1: discard; 2: and touch again; 3: done
};

class DiscardTest : public ::testing::TestWithParam<std::tuple<bool, bool>> {};

TEST_P(DiscardTest, FailsTheCapture) {
  constexpr uint64_t total = 3000 * page_size, discarded = 77 * page_size;
  const auto [shared, touch_again] = GetParam();
  Quiet* quiet = shared_with_victim<Quiet>();
  Victim victim([&, shared = shared] {
    const int fd = shared ? ::memfd_create("victim", 0) : -1;
    if (shared && ::ftruncate(fd, total) != 0) return 1;
    void* mapped = ::mmap(nullptr, total, PROT_READ | PROT_WRITE,
                          shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, fd, 0);
    if (mapped == MAP_FAILED) return 1;
    char* memory = static_cast<char*>(mapped);
    for (uint64_t at = 0; at < total; at += page_size) memory[at] = 1;
    quiet->address = reinterpret_cast<uint64_t>(memory);
    while (quiet->discard == 0) ::usleep(1000);
    if (shared) {
      ::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, discarded, page_size);
    } else {
      ::madvise(memory + discarded, page_size, MADV_DONTNEED);
    }
    const bool again = quiet->discard == 2;
    quiet->discard = 3;
    if (again) memory[discarded] = 2;
    ::pause();
    return 0;
  });
  ASSERT_TRUE(becomes_true([&] { return quiet->address != 0; }));
  const Process process = victim.process();
  ArmedCapture capture(process, {RemotePtr(quiet->address), total});
  quiet->discard = touch_again ? 2 : 1;
  ASSERT_TRUE(becomes_true([&] { return quiet->discard == 3; }));
  std::this_thread::sleep_for(20ms);
  const Status finished = capture.finish();
  ASSERT_FALSE(finished);
  EXPECT_EQ(finished.error().code(), ErrorCode::discarded) << finished.error().message();
  EXPECT_NE(finished.error().message().find("was discarded before it was copied"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Kinds, DiscardTest,
                         ::testing::Combine(::testing::Bool(), ::testing::Bool()),
                         [](const auto& kind) {
                           return std::string(std::get<0>(kind.param) ? "memfd" : "anonymous") +
                                  (std::get<1>(kind.param) ? "_touched_again" : "_left_alone");
                         });

}  // namespace
}  // namespace vmsnap
