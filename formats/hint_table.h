// Remembers which page contents are in the image already, by content hash.
//
// A bounded, set-associative table of hints. A hint may be wrong (two contents
// with one hash) or gone (overwritten); whoever uses one compares the bytes.
// It also remembers which contents are being stored this moment, so that a
// second worker with the same content waits for the first one's frame instead
// of storing a second.
//
// Thread-safe. Blocks only in wait().
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>

#include "formats/error.h"
#include "formats/sparse_array.h"

namespace vmsnap {

class HintTable {
 public:
  // Who claims: one number for each batch, never reused, from 1.
  using Owner = uint64_t;

  enum class Answer {
    compare,   // `candidate` is the entry of a page with this hash: compare, then ask again
    wait,      // another owner is storing a page with this hash: publish yours, wait(), ask again
    claimed,   // nobody has it: store it, then publish()
    unlisted,  // store it, tell nobody (a collision, or the set is full of claims)
  };

  // `entries` is rounded up to whole sets, and to a power of two of them.
  static Result<std::unique_ptr<HintTable>> create(size_t entries);

  // `rejected`: the candidates that turned out to have other bytes.
  Answer ask(uint64_t hash, Owner owner, std::span<const uint64_t> rejected, uint64_t& candidate);

  // Ends the claim of (hash, owner). `entry`, a packed PageEntry of a frame
  // that can be read back from now on; 0 withdraws the claim instead.
  void publish(uint64_t hash, Owner owner, uint64_t entry);

  // Until no other owner claims `hash`. The caller must hold no claim itself:
  // that is what rules out deadlock.
  void wait(uint64_t hash, Owner owner);

 private:
  static constexpr size_t ways = 8;  // two cache lines
  static constexpr size_t stripe_count = 256;

  struct Hint {
    uint64_t hash;
    uint64_t value;  // 0: free; a page entry; or a claim (kind 15, then the owner)
  };
  using Set = std::array<Hint, ways>;  // most recently used first

  struct alignas(64) Stripe {
    std::mutex mutex;
    std::condition_variable published;
    int waiting = 0;
  };

  HintTable() = default;
  Set& set_of(uint64_t hash) { return sets_[hash & (sets_.size() - 1)]; }
  Stripe& stripe_of(uint64_t hash) { return stripes_[hash & (stripe_count - 1)]; }

  SparseArray<Set> sets_;
  std::array<Stripe, stripe_count> stripes_;
};

}  // namespace vmsnap
