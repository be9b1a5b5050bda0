// Claims and hints, one call at a time; image_test.cpp runs them in threads.
#include "formats/hint_table.h"

#include <gtest/gtest.h>

#include <thread>

namespace vmsnap {
namespace {

using Answer = HintTable::Answer;

class HintTableTest : public testing::Test {
 protected:
  Answer ask(uint64_t hash, HintTable::Owner owner, std::span<const uint64_t> rejected = {}) {
    candidate_ = 0;
    return table_->ask(hash, owner, rejected, candidate_);
  }

  static constexpr uint64_t entry(uint64_t number) { return uint64_t{1} << 60 | number; }

  std::unique_ptr<HintTable> table_ = HintTable::create(1).value();
  uint64_t candidate_ = 0;
};

TEST_F(HintTableTest, ClaimThenCompare) {
  EXPECT_EQ(ask(5, 1), Answer::claimed);
  EXPECT_EQ(ask(5, 2), Answer::wait);
  EXPECT_EQ(ask(5, 1), Answer::unlisted);  // a collision within one batch
  EXPECT_EQ(ask(6, 2), Answer::claimed);
  table_->publish(5, 1, entry(10));
  EXPECT_EQ(ask(5, 2), Answer::compare);
  EXPECT_EQ(candidate_, entry(10));
}

TEST_F(HintTableTest, RejectedCandidatesAreNotOfferedAgain) {
  ask(5, 1);
  table_->publish(5, 1, entry(10));
  const uint64_t rejected[] = {entry(10)};
  EXPECT_EQ(ask(5, 2, rejected), Answer::claimed);
  table_->publish(5, 2, entry(20));
  EXPECT_EQ(ask(5, 3, rejected), Answer::compare);
  EXPECT_EQ(candidate_, entry(20));
}

TEST_F(HintTableTest, WithdrawnClaimsAreFree) {
  ask(5, 1);
  table_->publish(5, 1, 0);
  EXPECT_EQ(ask(5, 2), Answer::claimed);
}

TEST_F(HintTableTest, ClaimsAreNotOverwritten) {
  constexpr uint64_t same_set = 1 << 20;
  for (uint64_t i = 0; i < 8; ++i) EXPECT_EQ(ask(i * same_set, 1), Answer::claimed);
  EXPECT_EQ(ask(8 * same_set, 2), Answer::unlisted);
  table_->publish(3 * same_set, 1, entry(3));
  EXPECT_EQ(ask(8 * same_set, 2), Answer::claimed);  // in the place of the published one
  EXPECT_EQ(ask(3 * same_set, 2), Answer::unlisted);
}

TEST_F(HintTableTest, TheLeastRecentlyUsedIsForgotten) {
  constexpr uint64_t same_set = 1 << 20;
  for (uint64_t i = 0; i < 8; ++i) {
    ask(i * same_set, 1);
    table_->publish(i * same_set, 1, entry(i));
  }
  EXPECT_EQ(ask(0, 2), Answer::compare);  // used again
  EXPECT_EQ(ask(8 * same_set, 2), Answer::claimed);
  EXPECT_EQ(ask(0, 2), Answer::compare);
  EXPECT_EQ(ask(1 * same_set, 3), Answer::claimed);
}

TEST_F(HintTableTest, WaitEndsWhenTheClaimDoes) {
  ask(5, 1);
  std::thread other([&] { table_->publish(5, 1, entry(10)); });
  table_->wait(5, 2);
  EXPECT_EQ(ask(5, 2), Answer::compare);
  other.join();
  table_->wait(5, 2);  // nothing to wait for
}

}  // namespace
}  // namespace vmsnap
