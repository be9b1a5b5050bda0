// What the actors of writers.cpp write where. The oracle is writers_oracle.h.
//
// The range has four areas, each a whole number of 2 MiB:
//
//   writers  5/8  slots that T writer threads fill in a scattered order
//   uniform  1/8  equal pages; one thread (the sweeper) counts them up in order
//   fixed    1/8  incompressible, never written again
//   holes    1/8  never touched at first; one thread (the toucher) fills a page
//                 at a time, so that pages come into being during a snapshot
//
// Every actor performs its own numbered sequence of writes. When write k is
// complete, it publishes k in its counter, which lives in a page far away from
// the other actors' counters. Before a write it reads what all others have
// published, and the write stores that too.
#pragma once

#include <atomic>
#include <cstdint>
#include <numeric>
#include <utility>

namespace writers {

inline constexpr uint64_t page_bytes = 4096;
inline constexpr uint64_t huge_bytes = 2 << 20;
inline constexpr unsigned max_writers = 6;
inline constexpr unsigned sweeper = 6;
inline constexpr unsigned toucher = 7;
inline constexpr unsigned actors = 8;
inline constexpr unsigned slots_per_page = 2;  // for each writer
inline constexpr uint64_t smallest_bytes = 8 * huge_bytes;

using Counter = std::atomic<uint64_t>;

// One write: its number and what was seen. `begun` is stored first, then
// `seen`, then `done`; the machine (x86) makes stores visible in that order.
struct Slot {
  uint64_t begun;
  uint64_t seen[actors];
  uint64_t done;
};

// A page of the writers' area.
struct WriterPage {
  uint64_t index;        // constant
  uint64_t reserved[6];  // zero
  uint64_t counter;      // used in the home page of an actor only
  Slot slots[max_writers][slots_per_page];
  uint8_t rest[page_bytes - 64 - sizeof(Slot) * max_writers * slots_per_page];  // zero
};
static_assert(sizeof(WriterPage) == page_bytes);

// A page of the uniform area: like all others of the same generation.
struct UniformPage {
  uint64_t generation;
  uint64_t pattern[page_bytes / 8 - 1];
};
inline uint64_t uniform_word(unsigned i) { return 0x5555000000000000u + i / 8; }

// A page of the holes, once touched.
struct HolePage {
  uint64_t begun;
  uint64_t seen[actors];
  uint64_t done;
  uint8_t rest[page_bytes - 16 - 8 * actors];  // zero
};

struct Layout {
  uint64_t bytes = 0;
  unsigned threads = 0;
  uint64_t seed = 0;

  uint64_t eighth() const { return bytes / 8 / huge_bytes * huge_bytes; }
  uint64_t writer_bytes() const { return bytes - 3 * eighth(); }
  uint64_t uniform_at() const { return writer_bytes(); }
  uint64_t fixed_at() const { return writer_bytes() + eighth(); }
  uint64_t holes_at() const { return writer_bytes() + 2 * eighth(); }
  uint64_t writer_pages() const { return writer_bytes() / page_bytes; }
  uint64_t small_pages() const { return eighth() / page_bytes; }      // of each other area
  uint64_t slots() const { return writer_pages() * slots_per_page; }  // of each writer

  bool acts(unsigned actor) const { return actor >= sweeper || actor < threads; }

  // The page with the actor's counter.
  uint64_t home(unsigned actor) const { return writer_pages() * (2 * actor + 1) / (2 * actors); }
};

inline uint64_t mix(uint64_t value) {  // splitmix64's finaliser
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

inline void fill_fixed_page(uint64_t* page, uint64_t index, uint64_t seed) {
  uint64_t noise = mix(seed ^ (index << 20));
  for (unsigned i = 0; i < page_bytes / 8; ++i) {
    noise = noise * 6364136223846793005u + 1442695040888963407u;
    page[i] = noise;
  }
}

// The order in which one writer visits its slots. Write k (from 1 on) belongs
// to round (k-1)/slots, and each round visits every slot once, in an order that
// can be inverted: so the newest write <= K to any slot is computed, not looked
// up, however long the process has run.
class Order {
 public:
  Order(const Layout& layout, unsigned writer) : slots_(layout.slots()) {
    seed_ = mix(layout.seed * 64 + writer);
    step_ = seed_ % slots_;
    while (step_ < 2 || std::gcd(step_, slots_) != 1) step_ = (step_ + 1) % slots_;
    inverse_ = invert(step_, slots_);
  }

  uint64_t slot(uint64_t write) const {
    const uint64_t round = (write - 1) / slots_;
    return ((write - 1) % slots_ * step_ + shift(round)) % slots_;
  }

  // The newest write <= `last` that went to `slot`; 0 if there was none.
  uint64_t newest(uint64_t slot, uint64_t last) const {
    if (last == 0) return 0;
    const uint64_t round = (last - 1) / slots_;
    const uint64_t write = in_round(slot, round);
    if (write <= last) return write;
    return round == 0 ? 0 : in_round(slot, round - 1);
  }

 private:
  uint64_t shift(uint64_t round) const { return mix(seed_ ^ round) % slots_; }

  uint64_t in_round(uint64_t slot, uint64_t round) const {
    const uint64_t place = (slot + slots_ - shift(round)) % slots_ * inverse_ % slots_;
    return round * slots_ + place + 1;
  }

  static uint64_t invert(uint64_t value, uint64_t modulus) {  // extended Euclid
    int64_t t = 0, new_t = 1;
    auto r = static_cast<int64_t>(modulus), new_r = static_cast<int64_t>(value);
    while (new_r != 0) {
      const int64_t quotient = r / new_r;
      t = std::exchange(new_t, t - quotient * new_t);
      r = std::exchange(new_r, r - quotient * new_r);
    }
    return static_cast<uint64_t>(t < 0 ? t + static_cast<int64_t>(modulus) : t);
  }

  uint64_t slots_, seed_, step_, inverse_;
};

// Slot number -> where it is.
inline uint64_t slot_page(uint64_t slot) { return slot / slots_per_page; }
inline unsigned slot_place(uint64_t slot) { return static_cast<unsigned>(slot % slots_per_page); }

}  // namespace writers
