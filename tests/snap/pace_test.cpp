// The bounds on what a snapshot takes of its host.
#include "snap/pace.h"

#include <gtest/gtest.h>

#include "snap/memory_budget.h"

namespace vmsnap {
namespace {

using namespace std::chrono_literals;

TEST(Pace, KeepsTheRateOnTheAverage) {
  Pace pace(1000);
  auto now = Pace::Clock::time_point(100s);
  EXPECT_EQ(pace.wait(now), 0s);
  // A second's worth is had at once, what is over it is waited for.
  pace.used(3000, now);
  EXPECT_EQ(pace.wait(now), 2s);
  now += 2s;
  EXPECT_EQ(pace.wait(now), 0s);
  pace.used(500, now);
  EXPECT_EQ(pace.wait(now), 500ms);
}

TEST(Pace, DoesNotSaveUpForEver) {
  Pace pace(1000);
  auto now = Pace::Clock::time_point(1000s);
  pace.used(1, now);
  now += 3600s;
  pace.used(5000, now);
  EXPECT_EQ(pace.wait(now), 4s);
}

TEST(Pace, WithoutARateNobodyWaits) {
  Pace pace(0);
  pace.used(uint64_t{1} << 60);
  EXPECT_EQ(pace.wait(), 0s);
}

constexpr uint64_t mib = 1 << 20;

TEST(MemoryBudget, StaysWithinTheLimit) {
  const MemoryNeeds needs = {.pages = 1024 * 256, .workers = 2};
  EXPECT_EQ(*staging_within(std::nullopt, needs), 64 * mib);
  const uint64_t small = *staging_within(80 * mib, needs);
  EXPECT_GE(small, 8 * mib);
  EXPECT_LT(small, 40 * mib);
  EXPECT_EQ(*staging_within(80 * mib, {.pages = needs.pages, .workers = 2, .deltas = true}),
            small - 16 * mib);
  const auto refused = staging_within(32 * mib, needs);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::usage);
  EXPECT_NE(refused.error().remedy().find("--memory"), std::string::npos);
}

TEST(MemoryBudget, ALargeVmIsNotRefusedByDefault) {
  EXPECT_GE(*staging_within(std::nullopt, {.pages = uint64_t{4} << 28, .workers = 8}), 8 * mib);
}

}  // namespace
}  // namespace vmsnap
