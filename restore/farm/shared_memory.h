// The file in memory that the clones of one image share, as its owner sees it.
//
// It holds the image's pages at their page numbers times 4096. Clones map it
// privately: a page that is in it is theirs without any event, a page that is
// not raises a missing fault in the clone that touches it, and a page they
// write is copied for them by the kernel. Nobody but the owner can write to
// it: clones map a descriptor that is open for reading only, and its mode lets
// no other user open it.
//
// It lives as long as any mapping or descriptor does: a farm whose page server
// died finds it through one of its clones.
#pragma once

#include <cstdint>

#include "formats/error.h"
#include "formats/file.h"
#include "snap/vmm/process.h"

namespace vmsnap {

class SharedMemory {
 public:
  static Result<SharedMemory> create(uint64_t pages);
  // The one that a living clone has mapped. ErrorCode::damaged when it is not
  // one, or not for so many pages. Needs CAP_SYS_ADMIN or
  // CAP_CHECKPOINT_RESTORE.
  static Result<SharedMemory> of_clone(const Process& clone, uint64_t pages);

  int fd() const { return fd_.get(); }
  uint64_t pages() const { return pages_; }
  // Another descriptor, for reading only, to be mapped by a clone.
  Result<Fd> open_for_clone() const;

 private:
  SharedMemory(Fd fd, uint64_t pages) : fd_(std::move(fd)), pages_(pages) {}
  Fd fd_;
  uint64_t pages_;
};

// What one clone uses of the memory, in bytes, of its mappings of that file.
struct CloneMemory {
  uint64_t mapped = 0;        // address space
  uint64_t shared = 0;        // pages of the file that it has mapped
  uint64_t proportional = 0;  // its share of those, and what is its own (PSS)
  uint64_t own = 0;           // pages that it wrote, or was given alone
};
// Walks its page tables: milliseconds for each GiB.
Result<CloneMemory> clone_memory(const Process& clone);

}  // namespace vmsnap
