// What of the served memory the events of a userfaultfd say is gone: discarded
// by madvise(2), or unmapped. A pure function.
#pragma once

#include <cstdint>
#include <vector>

#include "restore/page_source.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

struct Removal {
  uint64_t first_page;  // of the image
  uint64_t pages;
};

std::vector<Removal> removals_of(const std::vector<UffdEvent>& events,
                                 const std::vector<ServedRange>& ranges);

}  // namespace vmsnap
