// Bringing the memory of a fresh, waiting VMM and the regions of an image
// together.
#pragma once

#include <vector>

#include "formats/image_reader.h"
#include "restore/page_marks.h"
#include "restore/page_source.h"
#include "snap/vmm/guest_memory.h"
#include "snap/vmm/process.h"
#include "snap/vmm/ram_blocks.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

// The RAM block of the VM for each region of the image, in the image's order.
// By name and length; names match with or without "/objects/" in front, which
// QEMU puts there or not by machine version and kind of backend. ErrorCode::vm
// names the first block that is missing, of another length, or too many: the
// VM is not the same machine.
Result<std::vector<MemoryBlock>> match_blocks(const std::vector<Region>& regions,
                                              const std::vector<RamBlock>& blocks);

// Registers all of the blocks for missing faults. From then on whoever touches
// an absent page waits for a page server. ErrorCode::refused for memory that
// userfaultfd cannot watch.
Result<std::vector<ServedRange>> watch_memory(const Uffd& uffd, const Process& process,
                                              std::vector<MemoryBlock> blocks);

// Pages that are there already (ROMs that QEMU loaded while it started) raise
// no fault: puts the image's content there, zeros included, and marks them
// resolved. To be called after watch_memory() and before anything runs, so that
// no page appears in between. Returns how many there were. ErrorCode::damaged
// if the content of one cannot be read: such a page cannot be poisoned.
Result<uint64_t> overwrite_present_pages(const Process& process, const ImageReader& image,
                                         const std::vector<ServedRange>& ranges, PageMarks& marks);

}  // namespace vmsnap
