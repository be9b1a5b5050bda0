// What a thread waits in, ended from time to time.
#include "snap/ticks.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <thread>

namespace vmsnap {
namespace {

using namespace std::chrono_literals;

// A pipe that nobody writes to.
class TicksTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(::pipe(ends_), 0); }
  void TearDown() override {
    ::close(ends_[0]);
    ::close(ends_[1]);
  }
  void expect_interrupted() {
    char byte;
    EXPECT_EQ(::read(ends_[0], &byte, 1), -1);
    EXPECT_EQ(errno, EINTR);
  }

  int ends_[2];
};

TEST_F(TicksTest, InterruptWhatWaitsAgainAndAgain) {
  Ticks ticks = *Ticks::start(5ms);
  for (int i = 0; i < 3; ++i) {
    expect_interrupted();
    EXPECT_TRUE(ticks.take());
  }
}

TEST_F(TicksTest, ComeAtOnceFromAnotherThread) {
  std::atomic<pid_t> waiting = 0;
  std::atomic<bool> done = false;
  std::thread thread([&] {
    Ticks ticks = *Ticks::start(24h);
    EXPECT_FALSE(ticks.take());
    waiting = ::gettid();
    expect_interrupted();
    EXPECT_TRUE(ticks.take());
    done = true;
  });
  // Again, because one that comes before the thread waits interrupts nothing.
  while (!done) {
    if (waiting) Ticks::interrupt(waiting);
    std::this_thread::sleep_for(1ms);
  }
  thread.join();
}

TEST_F(TicksTest, InterruptNobodyOnceTheyHaveEnded) {
  { const Ticks ended = *Ticks::start(1ms); }
  pollfd waiting = {ends_[0], POLLIN, 0};
  EXPECT_EQ(::poll(&waiting, 1, 20), 0);
  Ticks::interrupt(::gettid());  // a late one: nothing comes of it
  EXPECT_EQ(::poll(&waiting, 1, 20), 0);
}

}  // namespace
}  // namespace vmsnap
