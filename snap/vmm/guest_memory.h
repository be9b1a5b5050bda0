// The memory to capture or to serve, cut into pieces that the kernel treats
// alike.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "formats/image_info.h"
#include "snap/vmm/memory_map.h"
#include "snap/vmm/process.h"

namespace vmsnap {

// A named range of a process: one RAM block of a VM, one --range of a process.
struct MemoryBlock {
  std::string name;
  RemoteRange range;
  uint64_t address = 0;     // as in Region: what the image and its export say
  uint64_t first_page = 0;  // page number in the image of its first page
};

// Part of a block with one backing and one page size.
struct MemoryPiece {
  RemoteRange range;
  uint64_t first_page = 0;  // page number in the image of its first page
  Backing backing = Backing::other;
  uint64_t unit_bytes = 4096;  // what is protected and copied as a whole: its page size
  uint64_t file_offset = 0;
  std::shared_ptr<Fd> file;    // what is behind, open for reading; null: nothing

  bool shared() const {
    return backing == Backing::shared_memory || backing == Backing::hugetlb_shared;
  }
  // Private, but what the process has not written is the file's.
  bool private_of_file() const {
    return backing == Backing::private_of_file || backing == Backing::hugetlb_private;
  }
  uint64_t unit_count() const { return range.length / unit_bytes; }
};

struct GuestMemory {
  std::vector<MemoryBlock> blocks;
  std::vector<MemoryPiece> pieces;  // in page-number order
  bool mergeable = false;           // KSM may merge some of it

  uint64_t page_count() const;
  bool has_file() const;  // behind some of it
  std::vector<Region> regions() const;  // as an image records them
};

// Whether somebody else's userfaultfd watches some of it: a lazy restore, a
// snapshot, a migration.
Result<bool> is_watched(const Process& process, const std::vector<MemoryBlock>& blocks);
// ErrorCode::refused for a clone: its page server never ends before it.
Status check_not_clone(const Process& process, const std::vector<MemoryBlock>& blocks);

// Numbers the pages of `blocks` through (first_page is set here) and looks up
// what is behind them. ErrorCode::refused, naming block and reason, for memory
// that cannot be watched: a disk file, a device, a range that somebody else's
// userfaultfd holds, a piece of a huge page, a hole. Touches nothing.
Result<GuestMemory> map_guest_memory(const Process& process, std::vector<MemoryBlock> blocks);

}  // namespace vmsnap
