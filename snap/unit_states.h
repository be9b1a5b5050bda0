// Where each unit of guest memory stands in a capture: the claim that makes
// every page reach the image exactly once.
//
// A unit is one page of the mapping: 4 KiB, or a hugetlb page. One byte each
// (0.025 % of RAM in 4 KiB pages). All calls from any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "snap/vmm/guest_memory.h"

namespace vmsnap {

enum class UnitState : uint8_t {
  zero,     // nothing there at the instant: reads back as zero, is not copied
  armed,    // write-protected, still to be copied
  claimed,  // somebody is copying it
  done,     // copied and free
};

// The states of one piece of memory.
class UnitStates {
 public:
  explicit UnitStates(const MemoryPiece& piece)
      : count_(piece.unit_count()), states_(std::make_unique<std::atomic<UnitState>[]>(count_)) {}

  uint64_t count() const { return count_; }
  UnitState get(uint64_t unit) const { return states_[unit].load(std::memory_order_acquire); }
  void set(uint64_t unit, UnitState state) { states_[unit].store(state, std::memory_order_release); }

  // armed -> claimed; false if it is in any other state.
  bool claim(uint64_t unit) {
    UnitState expected = UnitState::armed;
    return states_[unit].compare_exchange_strong(expected, UnitState::claimed,
                                                 std::memory_order_acq_rel);
  }

 private:
  uint64_t count_;
  std::unique_ptr<std::atomic<UnitState>[]> states_;
};

}  // namespace vmsnap
