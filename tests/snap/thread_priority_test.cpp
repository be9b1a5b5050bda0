#include "snap/thread_priority.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <thread>

namespace vmsnap {
namespace {

int nice_now() { return ::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid())); }

// In a thread of its own: what it does to itself ends with it.
template <class Body>
void in_a_thread(Body body) {
  std::thread(body).join();
}

TEST(ThreadPriority, EndsWithItsScope) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to raise a nice value";
  in_a_thread([] {
    const int before = nice_now();
    {
      const LowerPriority deferred;
      EXPECT_EQ(nice_now(), before + 5);
      {
        const HigherPriority preferred;
        EXPECT_EQ(nice_now(), -20);
      }
      EXPECT_EQ(nice_now(), before + 5);
    }
    EXPECT_EQ(nice_now(), before);
  });
}

TEST(ThreadPriority, IsRaisedOutOfTheIdleClassToo) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to raise a nice value";
  in_a_thread([] {
    const int before = nice_now();
    const sched_param none = {};
    ASSERT_EQ(::sched_setscheduler(0, SCHED_IDLE, &none), 0);
    take_short_turns();  // the caller's wish comes first
    EXPECT_EQ(::sched_getscheduler(0), SCHED_IDLE);
    {
      const HigherPriority preferred;
      EXPECT_EQ(::sched_getscheduler(0), SCHED_BATCH);
      EXPECT_EQ(nice_now(), -20);
    }
    EXPECT_EQ(::sched_getscheduler(0), SCHED_IDLE);
    EXPECT_EQ(nice_now(), before);
  });
}

TEST(ThreadPriority, WhoAnswersIsFirst) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to raise a nice value";
  in_a_thread([] {
    prefer_this_thread();
    EXPECT_EQ(::sched_getscheduler(0), SCHED_BATCH);
    EXPECT_EQ(nice_now(), -20);
  });
}

TEST(ThreadPriority, WhoMovesMayMoveOn) {
  in_a_thread([] {
    cpu_set_t before, after;
    ASSERT_EQ(::sched_getaffinity(0, sizeof before, &before), 0);
    for (int processor = 0; processor < 8; ++processor) move_to(0, processor);  // some are not there
    move_to(0, CPU_SETSIZE);
    ASSERT_EQ(::sched_getaffinity(0, sizeof after, &after), 0);
    EXPECT_TRUE(CPU_EQUAL(&before, &after));

    // Where it may not run it does not go.
    cpu_set_t here;
    CPU_ZERO(&here);
    const int processor = ::sched_getcpu();
    CPU_SET(processor, &here);
    ASSERT_EQ(::sched_setaffinity(0, sizeof here, &here), 0);
    for (int other = 0; other < 8; ++other) move_to(0, other);
    EXPECT_EQ(::sched_getcpu(), processor);
  });
}

}  // namespace
}  // namespace vmsnap
