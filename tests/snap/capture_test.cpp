// The capture engine on a real process that writes, in-process, so that the
// sanitizers see its threads.
#include "snap/capture.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <thread>

#include "formats/image_layout.h"
#include "formats/image_reader.h"
#include "snap/vmm/handover.h"
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

// No file of ours grows beyond it.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t size) {
    ::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit smaller = {size, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &smaller);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    ::signal(SIGXFSZ, SIG_DFL);
  }

 private:
  rlimit before_ = {};
};

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

  static void wait_until(const std::function<bool()>& condition) { ASSERT_TRUE(becomes_true(condition)); }

  void begin(CaptureOptions options = {.staging_bytes = 16 << 20}, ImageWriterOptions image = {}) {
    writer_ = *ImageWriter::create(file_.get(), "image", pages, std::move(image));
    auto handed = bring_out_uffd(*process_, nullptr, capture_features(memory_), KeepInVmm::no);
    ASSERT_TRUE(handed) << handed.error().message();
    capture_ = *Capture::create(*process_, memory_, std::move(handed->uffd), *writer_, options);
    const Status begun = capture_->begin([] { return Status(); });
    ASSERT_TRUE(begun) << begun.error().message();
  }

  void arm() {
    const ThreadStop stopped = *ThreadStop::stop(*process_);
    const Status armed = capture_->arm();
    ASSERT_TRUE(armed) << armed.error().message();
  }

  Status copied() {
    capture_->start();
    return capture_->finish([] { return Status(); });
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
    EXPECT_FALSE(is_watched());
  }

  bool is_watched() {
    const auto mappings = read_memory_map(*process_);
    const auto pieces = mappings_of(*mappings, memory_.blocks[0].range);
    return std::ranges::any_of(*pieces, [](const Mapping& piece) {
      return piece.has_flag("uw") || piece.has_flag("um");
    });
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
    const Status finished = copied();
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

// Between the pause and the waiting for the end there is more to do, with a monitor
// that may not answer: no writer is to wait for that.
TEST_P(CaptureTest, CopiesBeforeAnybodyWaitsForTheEnd) {
  begin({.staging_bytes = 4 << 20});
  arm();
  capture_->start();
  const CaptureCounters& counters = capture_->counters();
  wait_until([&] { return counters.copied_pages == counters.armed_pages; });
  ASSERT_TRUE(capture_->finish([] { return Status(); }));
}

// Whoever would notice the failure may wait for the monitor of a VM that waits for one
// of these writers.
TEST_P(CaptureTest, AFailureFreesWhoWaitsBeforeAnybodyAsks) {
  const FileSizeLimit disk_full(layout::block_size);  // the header
  begin({.staging_bytes = 4 << 20});
  arm();
  capture_->start();
  wait_until([&] { return !is_watched(); });
  expect_unharmed();
  EXPECT_EQ(capture_->finish([] { return Status(); }).error().os_errno(), EFBIG);
}

TEST_P(CaptureTest, HolesTouchedAfterTheInstantReadZero) {
  begin();
  arm();
  touch_hole(pages - 1);
  ASSERT_TRUE(copied());
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
  ASSERT_TRUE(copied());
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
    ASSERT_TRUE(copied());
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
    const Status finished = copied();
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
  capture_->start();
  const Status finished = capture_->finish([] { return Status(fail(ErrorCode::interrupted, "enough")); });
  if (!finished) {
    EXPECT_EQ(finished.error().code(), ErrorCode::interrupted);
  }
  capture_.reset();
  expect_unharmed();
}

// Our threads hang, and cannot be waited for: the guest is let go first.
TEST_P(CaptureTest, AHungCaptureKeepsNobodyWaiting) {
  std::atomic<bool> hung = false;
  const auto hang = [&] {
    while (hung) std::this_thread::sleep_for(1ms);
  };
  ImageWriterOptions image;
  image.hash = [&](std::span<const std::byte>) -> uint64_t {
    hang();
    return 0;
  };
  begin({.staging_bytes = 4 << 20, .heartbeat = hang}, std::move(image));
  ::kill(victim_->pid(), SIGSTOP);  // before it is armed: it must not have written it all by then
  arm();
  hung = true;
  capture_->start();
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

}  // namespace
}  // namespace vmsnap
