// A handshake is any bytes that somebody sends: it is refused, or what is read
// from it lies within the image and does not overlap.
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "restore/firecracker.h"

using namespace vmsnap;

namespace {

constexpr uint64_t image_pages = 1 << 20;

void require(bool condition) {
  if (!condition) std::abort();
}

void check(const std::vector<ServedRange>& ranges) {
  require(!ranges.empty() && ranges.size() <= handshake_max_regions);
  for (const ServedRange& a : ranges) {
    require(a.unit == 4096 || a.unit == 2 << 20);
    require(a.range.length > 0 && a.range.length % a.unit == 0);
    require(a.range.start.address() % a.unit == 0);
    require(a.range.end() > a.range.start);
    require(a.first_page <= image_pages && a.page_count() <= image_pages - a.first_page);
    for (const ServedRange& b : ranges) {
      if (&a == &b) continue;
      require(a.range.end() <= b.range.start || b.range.end() <= a.range.start);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view message(reinterpret_cast<const char*>(data), size);
  const auto ranges = parse_handshake(message, image_pages);
  if (ranges) check(*ranges);

  // In one piece or byte by byte, the array ends at the same place.
  ArrayScanner whole, split;
  const ArrayScanner::State at_once = whole.add(message);
  ArrayScanner::State piecewise = ArrayScanner::State::incomplete;
  for (size_t i = 0; i < size && piecewise != ArrayScanner::State::not_an_array; ++i) {
    piecewise = split.add(message.substr(i, 1));
  }
  require(at_once == piecewise && whole.followed() == split.followed());
  // What is good must be seen as complete, or nobody would ever be served.
  if (ranges) require(at_once == ArrayScanner::State::complete && !whole.followed());
  return 0;
}
