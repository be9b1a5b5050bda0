#include "restore/ram_drop.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "restore/page_server.h"
#include "snap/vmm/handover.h"
#include "snap/vmm/pagemap.h"
#include "tests/restore/test_image.h"

namespace vmsnap::testing {
namespace {

// More than one window, so that several calls are injected.
constexpr uint64_t held_pages = (70 << 20) / page_size;

// A process that holds the pages of a test image, and changes them when told.
class Holder {
 public:
  explicit Holder(bool shared) {
    // Mapped here, at the address that the child will have it at.
    const int file = shared ? ::memfd_create("held", MFD_CLOEXEC) : -1;
    if (shared && ::ftruncate(file, held_pages * page_size) < 0) std::abort();
    memory_ = static_cast<std::byte*>(::mmap(
        nullptr, held_pages * page_size, PROT_READ | PROT_WRITE,
        shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, file, 0));
    int there[2], back[2];
    if (memory_ == MAP_FAILED || ::pipe(there) < 0 || ::pipe(back) < 0) std::abort();
    pid_ = ::fork();
    if (pid_ == 0) live(there[0], back[1]);
    ::munmap(memory_, held_pages * page_size);
    if (file >= 0) ::close(file);
    ::close(there[0]);
    ::close(back[1]);
    tell_ = Fd(there[1]);
    hear_ = Fd(back[0]);
    EXPECT_EQ(answer(), 'k');
    process_ = *Process::open(pid_);
  }
  ~Holder() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }

  const Process& process() const { return process_; }
  std::vector<MemoryBlock> blocks() const {
    return {{"range0", {RemotePtr(reinterpret_cast<uint64_t>(memory_)), held_pages * page_size}, 0, 0}};
  }
  // 'w': writes into a page, 'd': gives it back, 'c': compares all pages but the
  // given one with the image's. The answer of 'c' is 'k' or 'n'.
  void tell(char what, uint64_t page) {
    const Command command = {what, page};
    ASSERT_EQ(::write(tell_.get(), &command, sizeof command), ssize_t{sizeof command});
  }
  char answer() {
    char reply = 0;
    return ::read(hear_.get(), &reply, 1) == 1 ? reply : 'x';
  }
  char ask(char what, uint64_t page) {
    tell(what, page);
    return answer();
  }

 private:
  struct Command {
    char what;
    uint64_t page;
  };

  [[noreturn]] void live(int commands, int answers) {
    for (uint64_t page = 0; page < held_pages; ++page) {
      if (is_zero_page(page)) continue;
      const Page bytes = expected_page(page);
      std::memcpy(memory_ + page * page_size, bytes.data(), page_size);
    }
    char reply = 'k';
    [[maybe_unused]] ssize_t ignored = ::write(answers, &reply, 1);
    Command command;
    while (::read(commands, &command, sizeof command) == ssize_t{sizeof command}) {
      std::byte* at = memory_ + command.page * page_size;
      reply = 'k';
      if (command.what == 'w') *at = std::byte{0xee};
      if (command.what == 'd') ::madvise(at, page_size, MADV_DONTNEED);
      for (uint64_t page = 0; command.what == 'c' && page < held_pages; ++page) {
        const Page bytes = expected_page(page);
        const bool same = std::memcmp(memory_ + page * page_size, bytes.data(), page_size) == 0;
        if (!same && page != command.page) reply = 'n';
      }
      ignored = ::write(answers, &reply, 1);
    }
    ::_exit(0);
  }

  std::byte* memory_ = nullptr;
  pid_t pid_ = 0;
  Process process_;
  Fd tell_, hear_;
};

class RamDropTest : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (::geteuid() != 0) GTEST_SKIP() << "wants to be root";
    write_image(directory_ / "x.img", held_pages);
    image_ = open_image(directory_ / "x.img");
    auto memory = droppable_memory(holder_.process(), holder_.blocks());
    ASSERT_TRUE(memory) << memory.error().message();
    memory_ = *std::move(memory);
    ranges_ = served_ranges(memory_);
    auto handed = bring_out_uffd(holder_.process(), nullptr,
                                 page_server_features | ram_drop_features, KeepInVmm::yes);
    ASSERT_TRUE(handed) << handed.error().message();
    uffd_ = std::move(handed->uffd);
  }

  void expect_ok(const Status& status) { EXPECT_TRUE(status) << status.error().message(); }
  uint64_t bytes_there() const {
    if (GetParam()) {  // protected, an absent page looks like one that is there
      struct stat about = {};
      EXPECT_EQ(::fstat(memory_.pieces[0].file->get(), &about), 0);
      return static_cast<uint64_t>(about.st_blocks) * 512;
    }
    const auto map = PageMap::open(holder_.process());
    const auto runs = map->populated(ranges_[0].range);
    uint64_t bytes = 0;
    for (const RemoteRange& run : *runs) bytes += run.length;
    return bytes;
  }
  std::string compared() const {
    const Status same = compare_memory(holder_.process(), *image_, memory_);
    return same ? "the same" : same.error().message();
  }
  std::string differs(uint64_t page) const {
    return fmt::format("page {} of {} is not what {} has in its memory", page,
                       directory_ / "x.img", holder_.process().describe());
  }
  void freeze() { expect_ok(freeze_memory(uffd_, ranges_, marks_)); }
  void thaw() { expect_ok(thaw_memory(uffd_, ranges_, marks_)); }
  void drop() {
    expect_ok(drop_memory(holder_.process(), uffd_, memory_, marks_, [] {}));
    EXPECT_EQ(bytes_there(), 0u);
  }
  void serve_to_end() {
    PageServer server(uffd_, *image_, marks_, ranges_, {});
    const auto end = server.serve();
    ASSERT_TRUE(end) << end.error().message();
    EXPECT_EQ(*end, ServeEnd::filled);
  }

  TemporaryDirectory directory_;
  Holder holder_{GetParam()};
  std::unique_ptr<ImageReader> image_;
  GuestMemory memory_;
  std::vector<ServedRange> ranges_;
  Uffd uffd_;
  PageMarks marks_ = *PageMarks::in_memory(held_pages);
};

TEST_P(RamDropTest, AllGoesAndComesBack) {
  freeze();
  EXPECT_EQ(compared(), "the same");
  drop();
  for (uint64_t page = 0; page < held_pages; ++page) ASSERT_TRUE(marks_.wanted(page)) << page;
  thaw();
  serve_to_end();
  EXPECT_EQ(holder_.ask('c', held_pages), 'k');
}

TEST_P(RamDropTest, AWriterWaitsAndLosesNothing) {
  freeze();
  holder_.tell('w', 4);  // a page with data: write-protected
  EXPECT_EQ(compared(), "the same");
  drop();
  thaw();
  serve_to_end();
  EXPECT_EQ(holder_.answer(), 'k');
  EXPECT_EQ(holder_.ask('c', held_pages), 'n') << "its write is there";
  EXPECT_EQ(holder_.ask('c', 4), 'k') << "and nothing else changed";
}

TEST_P(RamDropTest, AWriterOfAnAbsentPageWaitsToo) {
  freeze();
  holder_.tell('w', 3);  // zero, never touched
  EXPECT_EQ(compared(), "the same");
  drop();
  thaw();
  serve_to_end();
  EXPECT_EQ(holder_.answer(), 'k');
  EXPECT_EQ(holder_.ask('c', held_pages), 'n');
  EXPECT_EQ(holder_.ask('c', 3), 'k');
}

TEST_P(RamDropTest, AnyDifferenceIsFound) {
  holder_.ask('w', 4);
  EXPECT_EQ(compared(), differs(4));
}

TEST_P(RamDropTest, APageWhereTheImageHasNone) {
  holder_.ask('w', held_pages - 1 - (held_pages - 1) % 3);
  EXPECT_EQ(compared(), differs(held_pages - 1 - (held_pages - 1) % 3));
}

// Of a file only the mapping would go.
class PrivateRamDropTest : public RamDropTest {};

TEST_P(PrivateRamDropTest, NoPageWhereTheImageHasOne) {
  holder_.ask('d', 100);
  EXPECT_EQ(compared(), differs(100));
}

TEST_P(RamDropTest, DamageOfTheImageIsFound) {
  damage_page(directory_ / "x.img", 4);
  image_ = open_image(directory_ / "x.img");
  const Status same = compare_memory(holder_.process(), *image_, memory_);
  ASSERT_FALSE(same);
  EXPECT_EQ(same.error().code(), ErrorCode::damaged);
}

TEST_P(RamDropTest, ReleasedItIsAsBefore) {
  freeze();
  expect_ok(release_memory(uffd_, ranges_, marks_));
  EXPECT_EQ(holder_.ask('w', 4), 'k');
  EXPECT_EQ(holder_.ask('w', 3), 'k');
  EXPECT_TRUE(droppable_memory(holder_.process(), holder_.blocks())) << "nobody watches it";
}

TEST_P(PrivateRamDropTest, WhatTheGuestGivesBackStaysZero) {
  freeze();
  holder_.tell('d', 4);  // waits until the event of it is read
  drop();
  EXPECT_EQ(holder_.answer(), 'k');
  thaw();
  EXPECT_TRUE(marks_.removed(4));
  EXPECT_FALSE(marks_.removed(5));
  serve_to_end();
  EXPECT_EQ(holder_.ask('c', 4), 'k');
  EXPECT_EQ(holder_.ask('c', held_pages), 'n');
}

TEST_P(RamDropTest, ASuccessorSettles) {
  freeze();
  holder_.tell('w', 4);
  expect_ok(settle_memory(holder_.process(), uffd_, ranges_, marks_));
  EXPECT_EQ(holder_.answer(), 'k') << "nothing is protected any more";
}

TEST_P(RamDropTest, AnEventThatAPredecessorHadRead) {
  // As the kernel writes them: our window, and a page that the guest gave back.
  struct Message {
    uint8_t event;
    uint8_t reserved[7];
    uint64_t start, end, unused;
  };
  const uint64_t start = ranges_[0].range.start.address();
  const Message messages[2] = {{0x15, {}, start, start + (uint64_t{62} << 20), 0},
                               {0x15, {}, start + 8 * page_size, start + 9 * page_size, 0}};
  static_assert(sizeof messages == 2 * Uffd::message_bytes);
  freeze();
  std::memcpy(marks_.event_buffer().data(), messages, sizeof messages);
  expect_ok(settle_memory(holder_.process(), uffd_, ranges_, marks_));
  EXPECT_FALSE(marks_.removed(7)) << "the window is our own";
  EXPECT_TRUE(marks_.removed(8));
  EXPECT_EQ(marks_.event_buffer()[0], std::byte{0}) << "done";
}

INSTANTIATE_TEST_SUITE_P(Memory, RamDropTest, ::testing::Values(false, true),
                         [](const auto& about) { return about.param ? "shared" : "anonymous"; });
INSTANTIATE_TEST_SUITE_P(Memory, PrivateRamDropTest, ::testing::Values(false),
                         [](const auto&) { return std::string("private"); });

TEST(DroppableMemory, LockedMemoryIsRefused) {
  void* memory = ::mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_EQ(::syscall(SYS_mlock, memory, page_size), 0);  // mlock(3) does nothing under ASan
  const auto self = Process::open(::getpid());
  const auto refused = droppable_memory(
      *self, {{"x", {RemotePtr(reinterpret_cast<uint64_t>(memory)), page_size}, 0, 0}});
  ::munmap(memory, page_size);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::refused);
  EXPECT_EQ(refused.error().message(), self->describe() + " has 4 KiB of memory locked");
}

}  // namespace
}  // namespace vmsnap::testing
