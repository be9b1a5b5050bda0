// The capture engine on a real process that writes, in-process, so that the
// sanitizers see its threads.
#include "snap/capture.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "formats/image_reader.h"
#include "snap/vmm/handover.h"
#include "snap/vmm/pagemap.h"
#include "snap/vmm/thread_stop.h"
#include "tests/snap/victim.h"

namespace vmsnap {
namespace {

using namespace std::chrono_literals;

constexpr uint64_t pages = 3000;
constexpr uint64_t touched = 2500;  // the rest is never written: holes
constexpr uint64_t bytes = pages * page_size;

enum class Kind { anonymous, memfd, private_memfd };

// Orders from the test, answers from the victim.
struct Talk {
  std::atomic<uint64_t> address{0};
  std::atomic<uint64_t> passes{0};
  std::atomic<int> touch_hole{-1};
};

char* map_memory(Kind kind, int& fd) {
  fd = -1;
  if (kind != Kind::anonymous) {
    fd = ::memfd_create("victim", 0);
    if (::ftruncate(fd, bytes) != 0) return nullptr;
  }
  const int flags = kind == Kind::memfd           ? MAP_SHARED
                    : kind == Kind::private_memfd ? MAP_PRIVATE
                                                  : MAP_PRIVATE | MAP_ANONYMOUS;
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

// Adds one to a word of every touched page, in page order, for ever: in any
// one instant at most one neighbouring pair of pages differs, by one.
int write_in_order(Kind kind, Talk* talk) {
  int fd = -1;
  char* memory = map_memory(kind, fd);
  if (!memory) return 1;
  const auto word = [&](uint64_t page) -> volatile uint64_t& {
    return *reinterpret_cast<volatile uint64_t*>(memory + page * page_size + 512);
  };
  for (;;) {
    for (uint64_t page = 0; page < touched; ++page) word(page) = word(page) + 1;
    ++talk->passes;
    talk->address = reinterpret_cast<uint64_t>(memory);
    if (const int page = talk->touch_hole; page >= 0) {
      memory[static_cast<uint64_t>(page) * page_size] = 1;
      talk->touch_hole = -1;  // after the write, which may have to wait for the fault handler
    }
  }
}

class CaptureTest : public ::testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    talk_ = shared_with_victim<Talk>();
    victim_ = std::make_unique<Victim>([this] { return write_in_order(GetParam(), talk_); });
    wait_until([&] { return talk_->passes > 2; });
    process_ = std::make_unique<Process>(victim_->process());
    MemoryBlock block{.name = "range0", .range = {RemotePtr(talk_->address), bytes}, .address = 0, .first_page = 0};
    auto memory = map_guest_memory(*process_, {block});
    ASSERT_TRUE(memory) << memory.error().message();
    memory_ = *std::move(memory);
    file_ = Fd(::memfd_create("image", 0));
  }

  template <class Condition>
  static void wait_until(Condition condition) {
    for (int i = 0; i < 60000 && !condition(); ++i) std::this_thread::sleep_for(1ms);
    ASSERT_TRUE(condition());
  }

  void begin(CaptureOptions options = {}, ImageWriterOptions image = {}) {
    writer_ = *ImageWriter::create(file_.get(), "image", pages, std::move(image));
    auto handed = bring_out_uffd(*process_, nullptr, capture_features(memory_), KeepInVmm::no);
    ASSERT_TRUE(handed) << handed.error().message();
    options.staging_bytes = 16 << 20;
    capture_ = *Capture::create(*process_, memory_, std::move(handed->uffd), *writer_, options);
    const Status begun = capture_->begin([] { return Status(); });
    ASSERT_TRUE(begun) << begun.error().message();
  }

  void arm() {
    const ThreadStop stopped = *ThreadStop::stop(*process_);
    const Status armed = capture_->arm();
    ASSERT_TRUE(armed) << armed.error().message();
  }

  // Returns when the page has been written to.
  void touch_hole(int page) {
    talk_->touch_hole = page;
    wait_until([&] { return talk_->touch_hole == -1; });
  }

  std::unique_ptr<ImageReader> finished_image() {
    ImageInfo info;
    info.regions = memory_.regions();
    EXPECT_TRUE(writer_->finish(info, {}));
    auto reader = ImageReader::open(fmt::format("/proc/self/fd/{}", file_.get()));
    EXPECT_TRUE(reader) << reader.error().message();
    return *std::move(reader);
  }

  // The byte that touch_hole() sets, as the image has it.
  static std::byte touched_byte(const ImageReader& image, uint64_t number) {
    std::array<std::byte, page_size> page;
    EXPECT_TRUE(image.read_page(number, page));
    return page[0];
  }

  // The words of all pages, as the image has them.
  std::vector<uint64_t> read_image() {
    const auto reader = finished_image();
    std::vector<uint64_t> words(pages);
    std::array<std::byte, page_size> page;
    for (uint64_t number = 0; number < pages; ++number) {
      EXPECT_TRUE(reader->read_page(number, page));
      std::memcpy(&words[number], page.data() + 512, sizeof(uint64_t));
    }
    return words;
  }

  void expect_unharmed() {
    const uint64_t before = talk_->passes;
    wait_until([&] { return talk_->passes > before + 1; });
    EXPECT_EQ(*process_->status_field("TracerPid"), "0");
    const auto mappings = read_memory_map(*process_);
    const auto pieces = mappings_of(*mappings, memory_.blocks[0].range);
    for (const Mapping& piece : *pieces) {
      EXPECT_FALSE(piece.has_flag("uw") || piece.has_flag("um"));
    }
  }

  Talk* talk_ = nullptr;
  std::unique_ptr<Victim> victim_;
  std::unique_ptr<Process> process_;
  GuestMemory memory_;
  Fd file_;
  std::unique_ptr<ImageWriter> writer_;
  std::unique_ptr<Capture> capture_;
};

TEST_P(CaptureTest, IsOneInstantAtFullWriteSpeed) {
  for (int round = 0; round < 5; ++round) {
    ASSERT_EQ(::ftruncate(file_.get(), 0), 0);
    begin();
    arm();
    const Status finished = capture_->finish([] { return Status(); });
    ASSERT_TRUE(finished) << finished.error().message();
    const std::vector<uint64_t> words = read_image();
    int edges = 0;
    for (uint64_t page = 1; page < touched; ++page) {
      if (words[page] == words[page - 1]) continue;
      EXPECT_EQ(words[page] + 1, words[page - 1]) << "at page " << page;
      ++edges;
    }
    EXPECT_LE(edges, 1);
    EXPECT_GT(words[0], 0u);
    for (uint64_t page = touched; page < pages; ++page) EXPECT_EQ(words[page], 0u) << page;
    capture_.reset();
    expect_unharmed();
  }
}

TEST_P(CaptureTest, HolesTouchedAfterTheInstantReadZero) {
  begin();
  arm();
  touch_hole(pages - 1);
  ASSERT_TRUE(capture_->finish([] { return Status(); }));
  EXPECT_EQ(touched_byte(*finished_image(), pages - 1), std::byte{0});
}

// Memory is armed before the instant, too: what comes into being in between has
// no mark yet, and is of the instant all the same.
TEST_P(CaptureTest, HolesTouchedBeforeTheInstantAreInTheImage) {
  begin();
  touch_hole(pages - 1);
  ASSERT_TRUE(capture_->arm_again());
  touch_hole(pages - 7);
  arm();
  ASSERT_TRUE(capture_->finish([] { return Status(); }));
  EXPECT_GT(capture_->counters().early_writes, 0u);
  const auto image = finished_image();
  for (const uint64_t touched_page : {pages - 1, pages - 7}) {
    EXPECT_EQ(touched_byte(*image, touched_page), std::byte{1}) << touched_page;
  }
}

// Ten in a row: each exact, and nothing of ours stays in the target.
TEST_P(CaptureTest, TheTenthLeavesWhatTheFirstFound) {
  const auto mappings = [&] { return read_memory_map(*process_)->size(); };
  const auto descriptors = [&] { return process_->descriptors()->size(); };
  const size_t mappings_before = mappings(), descriptors_before = descriptors();
  for (int round = 0; round < 10; ++round) {
    ASSERT_EQ(::ftruncate(file_.get(), 0), 0);
    begin();
    arm();
    ASSERT_TRUE(capture_->finish([] { return Status(); }));
    capture_.reset();
    expect_unharmed();
  }
  EXPECT_EQ(mappings(), mappings_before);
  EXPECT_EQ(descriptors(), descriptors_before);
}

// Nothing need stand still for this: what is written while memory is armed may
// be in the image or not, but no page may be missing from it.
TEST_P(CaptureTest, AWriteWhileArmingLosesNoPage) {
  for (int round = 0; round < 30; ++round) {
    ASSERT_EQ(::ftruncate(file_.get(), 0), 0);
    begin();
    const Status armed = capture_->arm();
    ASSERT_TRUE(armed) << armed.error().message();
    const Status finished = capture_->finish([] { return Status(); });
    ASSERT_TRUE(finished) << finished.error().message();
    const std::vector<uint64_t> words = read_image();
    for (uint64_t page = 0; page < touched; ++page) ASSERT_NE(words[page], 0u) << page;
    capture_.reset();
  }
}

TEST_P(CaptureTest, GivenUpAtAnyMomentLeavesTheTargetFree) {
  begin();
  capture_.reset();
  expect_unharmed();
  begin();
  arm();
  capture_.reset();
  expect_unharmed();
  begin();
  arm();
  const Status finished = capture_->finish([] { return Status(fail(ErrorCode::interrupted, "enough")); });
  if (!finished) {
    EXPECT_EQ(finished.error().code(), ErrorCode::interrupted);
  }
  capture_.reset();
  expect_unharmed();
}

// The output hangs, so our threads cannot be waited for: the guest is let go first.
TEST_P(CaptureTest, AHungOutputKeepsNobodyWaiting) {
  std::atomic<bool> hung = true;
  ImageWriterOptions image;
  image.hash = [&](std::span<const std::byte>) -> uint64_t {
    while (hung) std::this_thread::sleep_for(1ms);
    return 0;
  };
  begin({}, std::move(image));
  ::kill(victim_->pid(), SIGSTOP);  // before it is armed: it must not have written it all by then
  arm();
  ASSERT_FALSE(capture_->finish([] { return Status(fail(ErrorCode::interrupted, "enough")); }));
  const uint64_t passes = talk_->passes;
  ::kill(victim_->pid(), SIGCONT);
  const std::string wchan = fmt::format("/proc/{}/wchan", victim_->pid());
  wait_until([&] { return read_small_file(wchan).value_or("").find("userfault") != std::string::npos; });
  EXPECT_LE(talk_->passes, passes + 1);
  std::thread given_up([&] { capture_.reset(); });
  EXPECT_TRUE(becomes_true([&] { return talk_->passes > passes + 2; }));
  hung = false;
  given_up.join();
}

INSTANTIATE_TEST_SUITE_P(Kinds, CaptureTest,
                         ::testing::Values(Kind::anonymous, Kind::memfd, Kind::private_memfd),
                         [](const auto& kind) {
                           return kind.param == Kind::anonymous ? "anonymous"
                                  : kind.param == Kind::memfd   ? "memfd"
                                                                : "private_memfd";
                         });

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
    memory_ = *map_guest_memory(
        process_, {{.name = "ram", .range = {RemotePtr(talk_->address), total * page_size}, .address = 0, .first_page = 0}});
    writer_ = *ImageWriter::create(file_.get(), "image", total);
    auto handed = bring_out_uffd(process_, nullptr, capture_features(memory_), KeepInVmm::no);
    ASSERT_TRUE(handed) << handed.error().message();
    capture_ = *Capture::create(process_, memory_, std::move(handed->uffd), *writer_,
                                {.staging_bytes = 8 << 20});
    ASSERT_TRUE(capture_->begin([] { return Status(); }));
    ASSERT_TRUE(capture_->arm());
  }

  PrivateTalk* const talk_ = shared_with_victim<PrivateTalk>();
  Victim victim_{[this] { return live(talk_); }};
  const Process process_ = victim_.process();
  GuestMemory memory_;
  const Fd file_{::memfd_create("image", 0)};
  std::unique_ptr<ImageWriter> writer_;
  std::unique_ptr<Capture> capture_;
};

TEST_F(PrivateFileTest, IsCapturedAndItsHolesStayHoles) {
  const std::string resident = *process_.status_field("RssShmem");
  const Status finished = capture_->finish([] { return Status(); });
  ASSERT_TRUE(finished) << finished.error().message();
  EXPECT_EQ(*process_.status_field("RssShmem"), resident);
  EXPECT_EQ(capture_->counters().armed_pages, file_pages);
  ImageInfo info;
  info.regions = memory_.regions();
  ASSERT_TRUE(writer_->finish(info, {}));
  const auto image = *ImageReader::open(fmt::format("/proc/self/fd/{}", file_.get()));
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
  const Status finished = capture_->finish([] { return Status(); });
  ASSERT_FALSE(finished);
  EXPECT_EQ(finished.error().code(), ErrorCode::discarded);
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
  const GuestMemory memory = *map_guest_memory(process, {{.name = "range0", .range = range, .address = 0, .first_page = 0}});
  uint64_t split = 0, mended = 0;
  for (int round = 0; round < 10; ++round) {
    const Fd file(::memfd_create("image", 0));
    const auto writer = *ImageWriter::create(file.get(), "image", total / page_size);
    auto handed = bring_out_uffd(process, nullptr, capture_features(memory), KeepInVmm::no);
    ASSERT_TRUE(handed);
    CaptureOptions options;
    options.keep_huge_pages = GetParam();
    const auto capture = *Capture::create(process, memory, std::move(handed->uffd), *writer, options);
    ASSERT_TRUE(capture->begin([] { return Status(); }));
    {
      const ThreadStop stopped = *ThreadStop::stop(process);
      ASSERT_TRUE(capture->arm());
    }
    const Status finished = capture->finish([] { return Status(); });
    ASSERT_TRUE(finished) << finished.error().message();
    split += capture->counters().split_huge_pages;
    mended += capture->counters().mended_huge_pages;
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
  const auto [shared, touch_again] = GetParam();
  Quiet* quiet = shared_with_victim<Quiet>();
  Victim victim([&, shared = shared] {
    int fd = -1;
    char* memory = map_memory(shared ? Kind::memfd : Kind::anonymous, fd);
    for (uint64_t page = 0; page < pages; ++page) memory[page * page_size] = 1;
    quiet->address = reinterpret_cast<uint64_t>(memory);
    while (quiet->discard == 0) ::usleep(1000);
    if (shared) {
      ::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 77 * 4096, 4096);
    } else {
      ::madvise(memory + 77 * page_size, page_size, MADV_DONTNEED);
    }
    const bool again = quiet->discard == 2;
    quiet->discard = 3;
    if (again) memory[77 * page_size] = 2;
    ::pause();
    return 0;
  });
  while (quiet->address == 0) std::this_thread::sleep_for(1ms);
  const Process process = victim.process();
  MemoryBlock block{.name = "range0", .range = {RemotePtr(quiet->address), bytes}, .address = 0, .first_page = 0};
  const GuestMemory memory = *map_guest_memory(process, {block});
  const Fd file(::memfd_create("image", 0));
  const auto writer = *ImageWriter::create(file.get(), "image", pages);
  auto handed = bring_out_uffd(process, nullptr, capture_features(memory), KeepInVmm::no);
  ASSERT_TRUE(handed);
  const auto capture = *Capture::create(process, memory, std::move(handed->uffd), *writer, {});
  ASSERT_TRUE(capture->begin([] { return Status(); }));
  {
    const ThreadStop stopped = *ThreadStop::stop(process);
    ASSERT_TRUE(capture->arm());
  }
  quiet->discard = touch_again ? 2 : 1;
  while (quiet->discard != 3) std::this_thread::sleep_for(1ms);
  std::this_thread::sleep_for(20ms);
  const Status finished = capture->finish([] { return Status(); });
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
