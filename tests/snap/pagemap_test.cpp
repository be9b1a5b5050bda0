// Both ways of reading page marks say the same, for every kind of memory.
#include "snap/vmm/pagemap.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "snap/vmm/uffd.h"
#include "tests/snap/victim.h"

namespace vmsnap {
namespace {

constexpr uint64_t page_total = 3000;
constexpr uint64_t byte_total = page_total * 4096;

class PageMapTest : public ::testing::TestWithParam<bool> {
 protected:
  // Pages 10..19 and 2000 written, the rest untouched.
  void SetUp() override {
    const bool shared = GetParam();
    int fd = -1;
    if (shared) {
      fd = ::memfd_create("pagemap-test", MFD_CLOEXEC);
      ASSERT_EQ(::ftruncate(fd, byte_total), 0);
    }
    void* memory = ::mmap(nullptr, byte_total, PROT_READ | PROT_WRITE,
                          shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, fd, 0);
    ASSERT_NE(memory, MAP_FAILED);
    ::madvise(memory, byte_total, MADV_NOHUGEPAGE);
    memory_ = static_cast<char*>(memory);
    for (int page = 10; page < 20; ++page) memory_[page * 4096] = 1;
    memory_[2000 * 4096] = 1;
    if (fd >= 0) ::close(fd);
    range_ = {RemotePtr(reinterpret_cast<uint64_t>(memory)), byte_total};
  }
  void TearDown() override { ::munmap(memory_, byte_total); }

  std::vector<std::pair<uint64_t, uint64_t>> in_pages(const std::vector<RemoteRange>& runs) const {
    std::vector<std::pair<uint64_t, uint64_t>> found;
    for (const RemoteRange& run : runs) {
      found.emplace_back((run.start - range_.start) / 4096, run.length / 4096);
    }
    return found;
  }

  char* memory_ = nullptr;
  RemoteRange range_;
};

using Pages = std::vector<std::pair<uint64_t, uint64_t>>;

TEST_P(PageMapTest, FindsPagesAndMarksInBothWays) {
  const Process self = *Process::open(::getpid());
  const PageMap scan = *PageMap::open(self);
  const PageMap read = *PageMap::open(self, PageMap::Method::pagemap_read);
  const Pages written = {{10, 10}, {2000, 1}};
  EXPECT_EQ(in_pages(*scan.populated(range_)), written);
  EXPECT_EQ(in_pages(*read.populated(range_)), written);
  EXPECT_TRUE(scan.marked(range_)->empty());
  EXPECT_TRUE(read.marked(range_)->empty());

  const Uffd uffd = *Uffd::initialize(
      Fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK))),
      uffd_feature::pagefault_flag_wp | uffd_feature::wp_hugetlbfs_shmem);
  ASSERT_EQ(*uffd.register_range(range_, {.write_protect = true}), RegisterOutcome::done);
  ASSERT_EQ(*uffd.write_protect(range_), ProtectOutcome::done);
  // Of shared memory, absent pages are marked too.
  const Pages marked = GetParam() ? Pages{{0, page_total}} : written;
  EXPECT_EQ(in_pages(*scan.marked(range_)), marked);
  EXPECT_EQ(in_pages(*read.marked(range_)), marked);

  ASSERT_EQ(*uffd.unprotect({range_.start + 15 * 4096, 4096}), ProtectOutcome::done);
  const Pages after = GetParam() ? Pages{{0, 15}, {16, page_total - 16}} : Pages{{10, 5}, {16, 4}, {2000, 1}};
  EXPECT_EQ(in_pages(*scan.marked(range_)), after);
  EXPECT_EQ(in_pages(*read.marked(range_)), after);
  const Pages unmarked = {{15, 1}};
  EXPECT_EQ(in_pages(*scan.unmarked(range_)), unmarked);
  EXPECT_EQ(in_pages(*read.unmarked(range_)), unmarked);
}

TEST(PageMapHuge, TellsWhichPagesAreHuge) {
  constexpr uint64_t huge = 2 << 20;
  char* bytes = map_for_huge_pages(3 * huge);
  ASSERT_NE(bytes, nullptr);
  const RemotePtr start(reinterpret_cast<uint64_t>(bytes));
  ::madvise(bytes, huge, MADV_HUGEPAGE);
  ::madvise(bytes + huge, huge, MADV_NOHUGEPAGE);
  bytes[5] = bytes[huge + 5] = 1;
  const PageMap scan = *PageMap::open(*Process::open(::getpid()));
  const auto runs = *scan.huge({start, 3 * huge});
  ASSERT_EQ(runs.size(), 1u);
  EXPECT_EQ(runs[0].start, start);
  EXPECT_EQ(runs[0].length, huge);
}

INSTANTIATE_TEST_SUITE_P(Kinds, PageMapTest, ::testing::Values(false, true),
                         [](const auto& kind) { return kind.param ? "memfd" : "anonymous"; });

TEST(Uffd, OutcomesAreValues) {
  const size_t size = 16 * 4096;
  void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const RemoteRange range{RemotePtr(reinterpret_cast<uint64_t>(memory)), size};
  const auto fresh = [] {
    return *Uffd::initialize(Fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK))),
                             uffd_feature::pagefault_flag_wp);
  };
  const Uffd uffd = fresh(), other = fresh();
  EXPECT_EQ(*uffd.register_range(range, {.missing = true, .write_protect = true}), RegisterOutcome::done);
  EXPECT_EQ(*other.register_range(range, {.missing = true}), RegisterOutcome::busy);
  const std::vector<std::byte> page(4096, std::byte{7});
  EXPECT_EQ(uffd.copy(range.start, page)->outcome, CopyOutcome::copied);
  EXPECT_EQ(uffd.copy(range.start, page)->outcome, CopyOutcome::already_there);
  EXPECT_EQ(static_cast<char*>(memory)[5], 7);
  EXPECT_TRUE(uffd.read_events()->empty());
  ::munmap(memory, size);
  EXPECT_EQ(uffd.copy(range.start, page)->outcome, CopyOutcome::no_mapping);
  EXPECT_EQ(*uffd.write_protect(range), ProtectOutcome::no_mapping);
}

TEST(Uffd, NamesAMissingFeature) {
  const auto refused =
      Uffd::initialize(Fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC))), uint64_t{1} << 60);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::unsupported);
}

}  // namespace
}  // namespace vmsnap
