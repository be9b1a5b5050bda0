// What is refused before anything is touched, as far as it can be made here.
#include "snap/vmm/preflight.h"

#include <gtest/gtest.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include <atomic>
#include <thread>

#include "tests/snap/victim.h"

namespace vmsnap {
namespace {

using namespace std::chrono_literals;

struct Report {
  std::atomic<int> result{-1};  // 0: ready; else errno
  std::atomic<uint64_t> address{0};
};

void wait_for(const Report* report) {
  for (int i = 0; i < 20000 && report->result < 0; ++i) std::this_thread::sleep_for(1ms);
}

// Registered buffers are pinned: the kernel writes into them with no fault.
int register_buffer(void* memory, size_t length) {
  io_uring_params parameters = {};
  const int ring = static_cast<int>(::syscall(SYS_io_uring_setup, 4, &parameters));
  if (ring < 0) return errno;
  iovec buffer = {memory, length};
  return ::syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1) < 0 ? errno : 0;
}

TEST(Preflight, RefusesMemoryPinnedByIoUring) {
  Report* report = shared_with_victim<Report>();
  constexpr size_t length = 1 << 20;
  Victim victim([report] {
    void* memory =
        ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    report->result = register_buffer(memory, length);
    ::pause();
    return 0;
  });
  wait_for(report);
  if (report->result != 0) {
    GTEST_SKIP() << "no io_uring buffer here: " << std::strerror(report->result);
  }
  const Status refused = check_not_pinned(victim.process());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::refused);
  EXPECT_NE(refused.error().message().find("1024 KiB of memory pinned"), std::string::npos)
      << refused.error().message();
}

class AsynchronousIo : public ::testing::TestWithParam<bool> {};

TEST_P(AsynchronousIo, RefusesAProcessThatReadsAsynchronously) {
  Report* report = shared_with_victim<Report>();
  Victim victim([report, ring = GetParam()] {
    io_uring_params parameters = {};
    unsigned long context = 0;
    const long made = ring ? ::syscall(SYS_io_uring_setup, 4, &parameters) : ::syscall(SYS_io_setup, 4, &context);
    report->result = made < 0 ? errno : 0;
    ::pause();
    return 0;
  });
  wait_for(report);
  if (report->result != 0) GTEST_SKIP() << "not on this kernel: " << std::strerror(report->result);
  const Status refused = check_no_asynchronous_io(victim.process());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::refused);
}

// One that is used by its number in the kernel's list of the thread's rings.
TEST(Preflight, RefusesAnIoUringWithoutADescriptor) {
  Report* report = shared_with_victim<Report>();
  Victim victim([report] {
    io_uring_params parameters = {};
    const int ring = static_cast<int>(::syscall(SYS_io_uring_setup, 4, &parameters));
    const size_t length = parameters.sq_off.array + parameters.sq_entries * sizeof(uint32_t);
    void* queue = ring < 0 ? MAP_FAILED
                           : ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
                                    IORING_OFF_SQ_RING);
    io_uring_rsrc_update update = {.offset = ~0U, .resv = 0, .data = static_cast<uint64_t>(ring)};
    constexpr unsigned register_ring_fds = 20;  // IORING_REGISTER_RING_FDS, Linux 5.18
    const bool made = queue != MAP_FAILED &&
                      ::syscall(SYS_io_uring_register, ring, register_ring_fds, &update, 1) == 1;
    const int why = errno;
    ::close(ring);
    report->result = made ? 0 : why;
    ::pause();
    return 0;
  });
  wait_for(report);
  if (report->result != 0) GTEST_SKIP() << "not on this kernel: " << std::strerror(report->result);
  const Status refused = check_no_asynchronous_io(victim.process());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::refused);
}

INSTANTIATE_TEST_SUITE_P(Kinds, AsynchronousIo, ::testing::Bool(),
                         [](const auto& ring) { return ring.param ? "io_uring" : "aio"; });

// One file, mapped twice: writes through the other mapping would not be seen.
TEST(Preflight, RefusesMemoryThatTheProcessHasMappedTwice) {
  constexpr uint64_t length = 1 << 20;
  Report* report = shared_with_victim<Report>();
  std::atomic<bool>* again = shared_with_victim<std::atomic<bool>>();
  Victim victim([report, again] {
    const int fd = ::memfd_create("victim", 0);
    if (::ftruncate(fd, 2 * length) != 0) return 1;
    const auto map = [&](off_t offset) {
      return ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
    };
    report->address = reinterpret_cast<uint64_t>(map(0));
    map(length);  // another part of it does no harm
    report->result = 0;
    while (!*again) std::this_thread::sleep_for(1ms);
    map(0);
    report->result = 1;
    ::pause();
    return 0;
  });
  wait_for(report);
  const Process process = victim.process();
  const GuestMemory memory = *map_guest_memory(
      process, {{.name = "ram", .range = {RemotePtr(report->address), length}, .address = 0, .first_page = 0}});
  const Status fine = check_not_shared(process, memory);
  EXPECT_TRUE(fine) << fine.error().message();
  *again = true;
  ASSERT_TRUE(becomes_true([&] { return report->result == 1; }));
  const Status refused = check_not_shared(process, memory);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::refused);
}

TEST(Preflight, TakesAProcessWithoutPinnedMemory) {
  Victim victim([] {
    ::pause();
    return 0;
  });
  const Status fine = check_not_pinned(victim.process());
  EXPECT_TRUE(fine) << fine.error().message();
  EXPECT_TRUE(check_no_asynchronous_io(victim.process()));
}

}  // namespace
}  // namespace vmsnap
