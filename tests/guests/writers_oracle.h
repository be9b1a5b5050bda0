// Says whether memory laid out by writers_layout.h is that of one instant.
//
// Let C[a] be what actor a has published in this image. Then, in any one instant:
//   1. Every slot of writer t holds the newest write <= C[t] that goes there,
//      complete; only the slot of write C[t]+1 may be half written or written
//      but not yet published. The same holds for sweeper and toucher.
//   2. No write in the image has seen a number above C: what it saw had been
//      published before, so it must be in the image as well.
//   3. What never changes has not changed.
// An image with pages of two instants breaks 1 within one actor's pages or 2
// between two actors' pages.
#pragma once

#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "writers_layout.h"

namespace writers {

struct Verdict {
  std::string error;  // empty: one instant
  uint64_t published[actors] = {};
  uint64_t writes = 0;  // sum of published
};

class Oracle {
 public:
  // `settled`: nobody is writing now, so nothing may be half done.
  Oracle(const Layout& layout, const uint8_t* memory, bool settled)
      : layout_(layout), memory_(memory), settled_(settled) {}

  // Pages of the fixed area that its owner discarded and that read as zero now.
  void expect_discarded(uint64_t offset, uint64_t bytes) { gone_.emplace_back(offset, bytes); }

  Verdict check() {
    for (unsigned actor = 0; actor < actors; ++actor) {
      published_[actor] = read_page<WriterPage>(layout_.home(actor) * page_bytes).counter;
      verdict_.published[actor] = published_[actor];
      verdict_.writes += published_[actor];
    }
    if (check_writers() && check_uniform() && check_fixed()) check_holes();
    return verdict_;
  }

 private:
  template <class Page>
  Page read_page(uint64_t offset) const {
    Page page;
    static_assert(sizeof page == page_bytes);
    std::memcpy(&page, memory_ + offset, sizeof page);
    return page;
  }

  template <class... Args>
  bool bad(const char* format, Args... args) {
    char buffer[400];
    std::snprintf(buffer, sizeof buffer, format, args...);
    verdict_.error = buffer;
    return false;
  }

  static bool all_zero(const void* at, size_t bytes) {
    static const uint8_t zeros[page_bytes] = {};
    return std::memcmp(at, zeros, bytes) == 0;
  }

  bool check_seen(const char* what, uint64_t where, unsigned actor, const uint64_t* seen) {
    for (unsigned other = 0; other < actors; ++other) {
      if (other == actor || seen[other] <= published_[other]) continue;
      return bad("%s %lu of actor %u has seen write %lu of actor %u, who has published only %lu",
                 what, where, actor, seen[other], other, published_[other]);
    }
    return true;
  }

  bool check_writers() {
    std::vector<Order> orders;
    for (unsigned writer = 0; writer < layout_.threads; ++writer)
      orders.emplace_back(layout_, writer);
    for (uint64_t index = 0; index < layout_.writer_pages(); ++index) {
      const auto page = read_page<WriterPage>(index * page_bytes);
      if (page.index != index) {
        return bad("page %lu says that it is page %lu", index, page.index);
      }
      uint64_t counter = page.counter;
      for (unsigned actor = 0; actor < actors; ++actor) {
        if (layout_.acts(actor) && layout_.home(actor) == index) counter = 0;
      }
      if (counter != 0 || !all_zero(page.reserved, sizeof page.reserved) ||
          !all_zero(page.rest, sizeof page.rest)) {
        return bad("page %lu: a part that is never written is not zero", index);
      }
      for (unsigned writer = 0; writer < max_writers; ++writer) {
        for (unsigned place = 0; place < slots_per_page; ++place) {
          const Slot& slot = page.slots[writer][place];
          if (writer >= layout_.threads) {
            if (!all_zero(&slot, sizeof slot)) return bad("page %lu: unused slot written", index);
          } else if (!check_slot(orders[writer], writer, index * slots_per_page + place, slot)) {
            return false;
          }
        }
      }
    }
    return true;
  }

  bool check_slot(const Order& order, unsigned writer, uint64_t number, const Slot& slot) {
    const uint64_t last = published_[writer];
    const uint64_t expected = order.newest(number, last);
    const bool complete = slot.begun == expected && slot.done == expected;
    // The one write that may be under way: half written, or whole but not published.
    const bool in_flight = !settled_ && order.slot(last + 1) == number && slot.begun == last + 1 &&
                           (slot.done == expected || slot.done == last + 1);
    if (complete || in_flight) return check_seen("slot", number, writer, slot.seen);
    return bad("slot %lu (page %lu) of writer %u holds write %lu/%lu, not %lu; published: %lu",
               number, slot_page(number), writer, slot.begun, slot.done, expected, last);
  }

  bool check_uniform() {
    const uint64_t pages = layout_.small_pages(), last = published_[sweeper];
    for (uint64_t index = 0; index < pages; ++index) {
      const auto page = read_page<UniformPage>(layout_.uniform_at() + index * page_bytes);
      // How many of the writes 1..last went to this page: write k goes to (k-1) % pages.
      const uint64_t expected = last / pages + (index < last % pages);
      const bool next = !settled_ && last % pages == index && page.generation == expected + 1;
      if (page.generation != expected && !next) {
        return bad("uniform page %lu is of generation %lu, not %lu; published: %lu", index,
                   page.generation, expected, last);
      }
      for (unsigned i = 0; i < std::size(page.pattern); ++i) {
        if (page.pattern[i] != uniform_word(i)) return bad("uniform page %lu: word %u", index, i);
      }
    }
    return true;
  }

  bool check_fixed() {
    uint64_t expected[page_bytes / 8];
    for (uint64_t index = 0; index < layout_.small_pages(); ++index) {
      const uint64_t offset = layout_.fixed_at() + index * page_bytes;
      fill_fixed_page(expected, index, layout_.seed);
      for (const auto& [start, bytes] : gone_) {
        if (offset >= start && offset < start + bytes) std::memset(expected, 0, sizeof expected);
      }
      if (std::memcmp(expected, memory_ + offset, page_bytes) != 0) {
        return bad("fixed page %lu has changed%s", index,
                   all_zero(memory_ + offset, page_bytes) ? " to zeros" : "");
      }
    }
    return true;
  }

  bool check_holes() {
    const uint64_t last = published_[toucher];
    for (uint64_t index = 0; index < layout_.small_pages(); ++index) {
      const auto page = read_page<HolePage>(layout_.holes_at() + index * page_bytes);
      if (!all_zero(page.rest, sizeof page.rest)) return bad("hole %lu: a byte is not zero", index);
      const uint64_t write = index + 1;
      const bool in_flight = !settled_ && write == last + 1;
      if (write <= last || (in_flight && page.done == write)) {
        if (page.begun != write || page.done != write) {
          return bad("hole %lu holds write %lu/%lu; published: %lu", index, page.begun, page.done,
                     last);
        }
        if (!check_seen("hole", index, toucher, page.seen)) return false;
      } else if (in_flight) {
        if (page.done != 0) return bad("hole %lu: done %lu", index, page.done);
      } else if (!all_zero(&page, sizeof page)) {
        return bad("hole %lu is filled, but only %lu were published", index, last);
      }
    }
    return true;
  }

  Layout layout_;
  const uint8_t* memory_;
  bool settled_;
  uint64_t published_[actors] = {};
  std::vector<std::pair<uint64_t, uint64_t>> gone_;
  Verdict verdict_;
};

}  // namespace writers
