// The page tree of an image file: from a page number to its entry.
//
// Blocks are checked against the checksum in their parent before they are
// used, down from the root reference in the trailer.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>

#include "formats/byte_source.h"
#include "formats/error.h"
#include "formats/image_layout.h"

namespace vmsnap {

class PageTree {
 public:
  // Where the tree is; `begin`..`end` is the part of the file for its blocks.
  struct Shape {
    uint64_t image_seed = 0;
    uint64_t page_count = 0;
    uint32_t depth = 1;
    layout::Reference root = {};
    uint64_t begin = 0;
    uint64_t end = 0;
  };

  // A block whose checksum was right.
  class Block {
   public:
    uint64_t entry(uint64_t slot) const;               // of a leaf
    layout::Reference reference(uint64_t slot) const;  // of an inner block
    std::span<std::byte> bytes() { return bytes_; }

   private:
    alignas(8) std::array<std::byte, layout::block_size> bytes_;
  };
  using BlockPointer = std::shared_ptr<const Block>;

  // The source is borrowed.
  PageTree(const ByteSource& source, const Shape& shape);
  ~PageTree();

  // All of these: any number of threads; block on the disk; ErrorCode::damaged
  // if a block is not what it must be. At most `depth` reads, most of them
  // saved by a cache of 1024 blocks (4 MiB).

  // The packed PageEntry of a page below page_count.
  Result<uint64_t> entry(uint64_t page) const;

  // The first page >= `page` with an entry other than 0, or page_count.
  Result<uint64_t> next_data_page(uint64_t page) const;

  // One block, given the reference to it, which must not be {0, 0}.
  Result<BlockPointer> load(uint32_t level, uint64_t index, layout::Reference reference) const;

  const Shape& shape() const { return shape_; }

 private:
  struct Cache;

  Result<BlockPointer> read(uint32_t level, uint64_t index, layout::Reference reference) const;
  Status check_contents(uint32_t level, uint64_t index, const Block& block) const;
  Result<uint64_t> next_in(uint32_t level, uint64_t index, layout::Reference reference,
                           uint64_t page) const;

  const ByteSource& source_;
  const Shape shape_;
  const std::unique_ptr<Cache> cache_;
};

}  // namespace vmsnap
