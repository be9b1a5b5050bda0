// What is copied for a write that waits, before it goes on.
#include "snap/fault_handler.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "snap/capture.h"
#include "snap/ticks.h"
#include "snap/vmm/handover.h"
#include "tests/snap/victim.h"

namespace vmsnap {
namespace {

using namespace std::chrono_literals;

constexpr uint64_t victim_pages = huge_page_bytes / page_size;

struct WriterTalk {
  std::atomic<uint64_t> address{0};
  std::atomic<int> write_to{-1};  // a page; -1 once it was written to
};

int write_as_told(WriterTalk* talk) {
  char* memory = map_for_huge_pages(huge_page_bytes);
  if (!memory) return 1;
  std::memset(memory, 'a', huge_page_bytes);
  talk->address = reinterpret_cast<uint64_t>(memory);
  for (;;) {
    if (const int page = talk->write_to; page >= 0) {
      memory[static_cast<uint64_t>(page) * page_size] = 'b';
      talk->write_to = -1;
    }
  }
}

class FaultHandlerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(becomes_true([&] { return talk_->address != 0; }));
    const RemoteRange range = {RemotePtr(talk_->address), victim_pages * page_size};
    memory_ = *map_guest_memory(process_, {{.name = "ram", .range = range, .address = 0, .first_page = 0}});
    auto handed = bring_out_uffd(process_, nullptr, capture_features(memory_), KeepInVmm::no);
    ASSERT_TRUE(handed) << handed.error().message();
    state_ = std::make_unique<CaptureState>(process_, *PageMap::open(process_), std::move(handed->uffd),
                                            memory_, *Staging::create(8 << 20));
    ASSERT_EQ(*state_->uffd.register_range(range, {.write_protect = true}), RegisterOutcome::done);
    ASSERT_EQ(*state_->uffd.write_protect(range), ProtectOutcome::done);
    for (uint64_t page = 0; page < victim_pages; ++page) state_->pieces[0]->states.set(page, UnitState::armed);
    state_->armed = true;
    queue_ = *UffdQueue::open(state_->uffd);
    handler_ = std::make_unique<FaultHandler>(*state_, true, 10s, [this] { ++beats_; });
    ASSERT_TRUE(handler_->prepare());
  }

  // Returns when the victim waits for its write.
  void write(int page) {
    talk_->write_to = page;
    ASSERT_TRUE(becomes_true([&] { return queue_->has_events(); }));
  }
  bool written() const { return talk_->write_to == -1; }

  // The pages that were handed on, all as they were at the instant.
  std::vector<uint64_t> staged() {
    Chunk* const chunk = state_->staging->try_take_full();
    if (!chunk) return {};
    for (const std::byte byte : chunk->data()) EXPECT_EQ(byte, std::byte{'a'});
    return {chunk->numbers().begin(), chunk->numbers().end()};
  }

  WriterTalk* const talk_ = shared_with_victim<WriterTalk>();
  Victim victim_{[this] { return write_as_told(talk_); }};
  Process process_ = victim_.process();
  GuestMemory memory_;
  std::unique_ptr<CaptureState> state_;
  std::optional<UffdQueue> queue_;
  std::atomic<int> beats_ = 0;
  std::unique_ptr<FaultHandler> handler_;
};

TEST_F(FaultHandlerTest, CopiesBeforeTheWriterGoesOn) {
  EXPECT_EQ(*handler_->answer_events(), 0u);  // nobody waits
  write(3);
  EXPECT_FALSE(written());
  EXPECT_EQ(*handler_->answer_events(), 1u);
  EXPECT_TRUE(becomes_true([&] { return written(); }));
  EXPECT_EQ(state_->counters.write_faults, 1u);
  EXPECT_EQ(state_->writers_woken, 1u);
  EXPECT_EQ(state_->pieces[0]->states.get(3), UnitState::done);

  // What waits when it is told to stop is answered.
  write(40);
  handler_->request_stop();
  std::thread([this] { handler_->run(); }).join();
  EXPECT_TRUE(becomes_true([&] { return written(); }));
  EXPECT_TRUE(state_->status());
  EXPECT_EQ(staged(), (std::vector<uint64_t>{3, 40}));
}

// Where it waits for the next write, it is told when to look around.
TEST_F(FaultHandlerTest, WaitsWithoutLosingSight) {
  std::thread runs([this] { handler_->run(); });
  for (const int page : {3, 100}) {
    talk_->write_to = page;
    EXPECT_TRUE(becomes_true([&] { return written(); }));
    handler_->follow_writer();
    const int before = beats_;
    EXPECT_TRUE(becomes_true([&] { return beats_ > before; }));
    std::vector<uint64_t> found;
    EXPECT_TRUE(becomes_true([&] { return !(found = staged()).empty(); }));  // before it is told to stop
    EXPECT_EQ(found, (std::vector<uint64_t>{static_cast<uint64_t>(page)}));
  }
  handler_->request_stop();
  runs.join();
  EXPECT_TRUE(state_->status());
}

TEST_F(FaultHandlerTest, DoesWithoutATimer) {
  rlimit before;
  ASSERT_EQ(::getrlimit(RLIMIT_SIGPENDING, &before), 0);
  const rlimit none = {0, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_SIGPENDING, &none), 0);
  EXPECT_FALSE(Ticks::start(1ms));
  std::thread runs([this] { handler_->run(); });
  for (const int page : {3, 100}) {
    talk_->write_to = page;
    EXPECT_TRUE(becomes_true([&] { return written(); }));
  }
  handler_->request_stop();
  runs.join();
  ASSERT_EQ(::setrlimit(RLIMIT_SIGPENDING, &before), 0);
  EXPECT_TRUE(state_->status());
  std::vector<uint64_t> found = staged();
  if (found.size() == 1) found.push_back(staged().at(0));  // a while lay between them
  EXPECT_EQ(found, (std::vector<uint64_t>{3, 100}));
}

TEST_F(FaultHandlerTest, SeesThatTheVmEnds) {
  std::thread runs([this] { handler_->run(); });
  talk_->write_to = 3;
  EXPECT_TRUE(becomes_true([&] { return written(); }));
  ASSERT_TRUE(becomes_true([&] { return queue_ && !queue_->has_events(); }));
  ::kill(process_.pid(), SIGKILL);
  runs.join();
  EXPECT_EQ(state_->status().error().code(), ErrorCode::vm);
}

TEST_F(FaultHandlerTest, IsToldWhoWaits) {
  write(3);
  const auto events = *state_->uffd.read_events();
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].thread, process_.pid());
}

// Somebody who writes near where a write has waited will go on there; who writes
// anywhere waits for one page only.
TEST_F(FaultHandlerTest, CopiesNeighboursOfWritesThatAreNearToEachOther) {
  for (const int page : {20, 100, 29}) {
    write(page);
    EXPECT_EQ(*handler_->answer_events(), 1u);
    EXPECT_TRUE(becomes_true([&] { return written(); }));
  }
  handler_->request_stop();
  std::thread([this] { handler_->run(); }).join();
  EXPECT_EQ(staged(), (std::vector<uint64_t>{20, 100, 24, 25, 26, 27, 28, 29, 30, 31}));
}

// Who writes page after page waits ever more rarely.
TEST_F(FaultHandlerTest, CopiesMoreAheadOfWritesInOrder) {
  for (const int page : {64, 65, 72, 80, 88, 104}) {
    write(page);
    EXPECT_EQ(*handler_->answer_events(), 1u);
    EXPECT_TRUE(becomes_true([&] { return written(); }));
  }
  EXPECT_EQ(state_->counters.copied_pages, 72u);  // the last time, 32
}

// Of a huge page that is small pages already, there is nothing to keep together.
TEST_F(FaultHandlerTest, CopiesAllOfAHugePageWhileItIsOne) {
  state_->pieces[0]->note_huge(0, victim_pages);
  state_->pieces[0]->states.set(7, UnitState::done);
  write(3);
  EXPECT_EQ(*handler_->answer_events(), 1u);
  EXPECT_TRUE(becomes_true([&] { return written(); }));
  EXPECT_EQ(state_->counters.copied_pages, 1u);

  for (uint64_t page = 0; page < victim_pages; ++page) state_->pieces[0]->states.set(page, UnitState::armed);
  ASSERT_EQ(*state_->uffd.write_protect(memory_.pieces[0].range), ProtectOutcome::done);
  write(3);
  EXPECT_EQ(*handler_->answer_events(), 1u);
  EXPECT_TRUE(becomes_true([&] { return written(); }));
  EXPECT_EQ(state_->counters.copied_pages, 1 + victim_pages);
}

}  // namespace
}  // namespace vmsnap
