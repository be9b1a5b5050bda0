// The memory of the two "ordered" guests (ordered.S under QEMU, kvm_ordered.cpp
// under KVM_RUN) and what any single instant of it must look like.
//
// The guest adds one to a counter in every page, in page order, for ever. So at
// any instant the counters are v+1 up to some page and v from the next one on:
// at most one edge, and that of exactly one, downwards. An image with pages of
// two instants has a second edge or a bigger one. The counters are 32 bits
// wide: with a byte, a page that is 256 passes too late would pass.
//
// The rest of the page is constant, and differs from page to page, so that a
// page that landed at a wrong place, or half of one, is seen too.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

namespace ordered {

inline constexpr uint64_t page_bytes = 4096;
inline constexpr uint32_t words = page_bytes / 4;

// Word 0 is the counter, word 1 the page's own address. Of every fourth page
// the rest is pseudo-random, which no codec can shrink; of the others, zero.
inline bool has_noise(uint32_t address) { return (address >> 12) % 4 == 0; }

inline uint32_t next_noise(uint32_t value) { return value * 1664525u + 1013904223u; }

inline void fill_page(uint32_t* page, uint32_t address) {
  std::memset(page, 0, page_bytes);
  page[1] = address;
  if (!has_noise(address)) return;
  uint32_t noise = address;
  for (uint32_t i = 2; i < words; ++i) page[i] = noise = next_noise(noise);
}

struct Verdict {
  std::string error;        // empty: the memory is of one instant
  uint32_t edges = 0;       // 0 or 1
  uint32_t first_page = 0;  // the first page of the older counter, if edges == 1
  uint32_t counter = 0;     // of the first page
};

template <class... Args>
std::string text(const char* format, Args... args) {
  char buffer[400];
  std::snprintf(buffer, sizeof buffer, format, args...);
  return buffer;
}

// `memory` holds `pages` pages whose first one is at `address` for the guest.
inline Verdict check(const uint8_t* memory, uint32_t pages, uint32_t address) {
  Verdict verdict;
  uint32_t expected[words];
  uint32_t previous = 0;
  for (uint32_t i = 0; i < pages; ++i) {
    const uint32_t here = address + i * static_cast<uint32_t>(page_bytes);
    uint32_t page[words];
    std::memcpy(page, memory + uint64_t{i} * page_bytes, page_bytes);
    const uint32_t counter = page[0];
    fill_page(expected, here);
    expected[0] = counter;
    for (uint32_t word = 1; word < words; ++word) {
      if (page[word] == expected[word]) continue;
      verdict.error = text("page %u, word %u: %08x, not the constant %08x", i, word, page[word],
                           expected[word]);
      return verdict;
    }
    if (i == 0) {
      verdict.counter = counter;
    } else if (counter != previous) {
      if (previous - counter != 1) {
        verdict.error = text("between pages %u and %u the counter goes from %u to %u", i - 1, i,
                             previous, counter);
        return verdict;
      }
      if (++verdict.edges > 1) {
        verdict.error =
            text("a second edge at page %u (the first one is at page %u)", i, verdict.first_page);
        return verdict;
      }
      verdict.first_page = i;
    }
    previous = counter;
  }
  return verdict;
}

}  // namespace ordered
