#include "restore/removals.h"

#include <algorithm>

namespace vmsnap {

std::vector<Removal> removals_of(const std::vector<UffdEvent>& events,
                                 const std::vector<ServedRange>& ranges) {
  std::vector<Removal> removals;
  for (const UffdEvent& event : events) {
    if (event.kind != UffdEvent::Kind::removed && event.kind != UffdEvent::Kind::unmapped) continue;
    for (const ServedRange& range : ranges) {
      const RemotePtr from = std::max(event.address, range.range.start);
      const RemotePtr to = std::min(event.address + event.length, range.range.end());
      if (from < to) removals.push_back({range.page_at(from), (to - from) / page_size});
    }
  }
  return removals;
}

}  // namespace vmsnap
