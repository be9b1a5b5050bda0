// Pages that are stored already, outside of what a writer has stored itself:
// earlier snapshots in the same store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "formats/image_info.h"

namespace vmsnap {

// Answers are page entries that may be used instead of storing the page: the
// bytes were read back and compared, never only their hash. 0: none is known.
// A stored page that cannot be read back is one that is not known.
// Any number of threads; blocks on the disk.
class KnownPages {
 public:
  virtual ~KnownPages() = default;

  // The page of this number in the snapshot before.
  virtual uint64_t same_place(uint64_t page, std::span<const std::byte, page_size> bytes) = 0;
  // Any page with this content hash.
  virtual uint64_t same_content(uint64_t hash, uint64_t page,
                                std::span<const std::byte, page_size> bytes) = 0;
  // Whether page number `page` may use an entry that its own writer stored or
  // found for another page: false keeps a region's pages near each other.
  virtual bool may_share(uint64_t page, uint64_t entry) = 0;
};

}  // namespace vmsnap
