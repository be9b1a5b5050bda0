// Pages that have most of their bytes in common, at different places.
#pragma once

#include <algorithm>

#include "tests/formats/test_image.h"

namespace vmsnap {

// Alone none of a family compresses. Member 0 is random_page(family).
inline PageBytes similar_page(uint64_t family, uint64_t member) {
  PageBytes page = random_page(family);
  std::ranges::rotate(page, page.begin() + static_cast<ptrdiff_t>(member * 37 % page_size));
  for (size_t i = 0; i < member % 50; ++i) page[member * 101 % 4000 + i] ^= std::byte{0x5a};
  return page;
}

}  // namespace vmsnap
