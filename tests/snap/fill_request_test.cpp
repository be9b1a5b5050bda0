#include "snap/vmm/fill_request.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace vmsnap {
namespace {

TEST(FillRequest, NobodyIsThere) {
  const Process self = *Process::open(::getpid());
  EXPECT_EQ(ask_for_fill(self), FillAnswer::nobody);
}

TEST(FillRequest, IsAnsweredOnceAsked) {
  const Process self = *Process::open(::getpid());
  auto requests = FillRequests::listen(self);
  ASSERT_TRUE(requests) << requests.error().message();
  EXPECT_FALSE(requests->answer(FillAnswer::comes));
  EXPECT_FALSE(FillRequests::listen(self));
  for (const FillAnswer wanted : {FillAnswer::comes, FillAnswer::parked}) {
    FillAnswer got = FillAnswer::nobody;
    std::thread asking([&] { got = ask_for_fill(self); });
    while (!requests->answer(wanted)) std::this_thread::yield();
    asking.join();
    EXPECT_EQ(got, wanted);
  }
}

// A page server that stands still, and a snapshot after the other that asked it.
TEST(FillRequest, NobodyWaitsBehindOthers) {
  const Process self = *Process::open(::getpid());
  auto requests = FillRequests::listen(self);
  ASSERT_TRUE(requests);
  std::vector<std::thread> asking;
  std::atomic<int> done = 0;
  for (int i = 0; i < 12; ++i) {
    asking.emplace_back([&] {
      EXPECT_EQ(ask_for_fill(self), FillAnswer::nobody);
      ++done;
    });
  }
  for (int tries = 0; done < 12 && tries < 60000; ++tries) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(done, 12);
  while (done < 12) requests->answer(FillAnswer::parked);
  for (std::thread& thread : asking) thread.join();
}

// The name is free for anybody to take, and anybody can connect.
TEST(FillRequest, AnotherUserIsNotHeard) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to become another user";
  const Process self = *Process::open(::getpid());
  auto requests = FillRequests::listen(self);
  ASSERT_TRUE(requests);
  const pid_t child = ::fork();
  if (child == 0) {
    const bool changed = ::setgid(65534) == 0 && ::setuid(65534) == 0;
    ::_exit(changed && ask_for_fill(self) == FillAnswer::nobody ? 0 : 1);
  }
  int status = -1;
  while (::waitpid(child, &status, WNOHANG) == 0) {
    EXPECT_FALSE(requests->answer(FillAnswer::comes));
    std::this_thread::yield();
  }
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace vmsnap
