// Handing the RAM of a paused VM back to the host, once an image is known to
// hold every page of it.
//
// The order makes it exact even if somebody resumes the VM meanwhile:
//
//   freeze_memory   all is watched for missing pages and write-protected: no
//                   page can change or appear; who tries waits
//   compare_memory  every page with the image
//   drop_memory     the pages go; from here on the image alone has them
//   thaw_memory     the protection goes, and who waits tries again, and meets
//                   a missing page, which a page server is to bring
//
// Until the thaw nobody answers faults. Private memory is dropped by an
// madvise(2) that the VMM is made to run (injector.h), window by window. Its
// thread then waits until the event of it is read; such a removal is ours, and
// is not marked as given back by the guest. It is known by being one whole
// window, of a length that no guest gives back by itself. Shared memory is
// dropped by punching holes into its file, which raises no event.
//
// What the VMM has mlocked, hugetlbfs, and private mappings of a file are
// refused.
//
// Sources: userfaultfd(2), madvise(2), fallocate(2).
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "formats/error.h"
#include "formats/image_reader.h"
#include "restore/page_marks.h"
#include "restore/page_source.h"
#include "snap/vmm/guest_memory.h"
#include "snap/vmm/process.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

// What the userfaultfd must have beside what a page server wants.
inline constexpr uint64_t ram_drop_features =
    uffd_feature::pagefault_flag_wp | uffd_feature::wp_hugetlbfs_shmem;

// Looks up what is behind the blocks. ErrorCode::refused, naming the block, for
// what cannot be dropped and brought back, or is written by others than the
// process. Touches nothing.
Result<GuestMemory> droppable_memory(const Process& process, std::vector<MemoryBlock> blocks);

// The memory as a page server has it.
std::vector<ServedRange> served_ranges(const GuestMemory& memory);

// `marks` are for what the guest gives back, here and below.
Status freeze_memory(const Uffd& uffd, const std::vector<ServedRange>& ranges, PageMarks& marks);

// Reads the image and the memory as a whole, with several threads.
// ErrorCode::vm names the first page found that is not the image's,
// ErrorCode::damaged one that cannot be read, ErrorCode::interrupted.
Status compare_memory(const Process& process, const ImageReader& image, const GuestMemory& memory);

// Some of it may be gone when this fails. If we are killed, the helper that has
// the VMM run the madvise may wait until a successor reads its event: `let_go`
// is called in it first, and is to close what a successor could not do without.
Status drop_memory(const Process& process, const Uffd& uffd, const GuestMemory& memory,
                   PageMarks& marks, const std::function<void()>& let_go);

// Also of memory that was not frozen.
Status thaw_memory(const Uffd& uffd, const std::vector<ServedRange>& ranges, PageMarks& marks);

// After freeze_memory() alone: as if it had never been.
Status release_memory(const Uffd& uffd, const std::vector<ServedRange>& ranges, PageMarks& marks);

// For a successor of one that was killed somewhere above: waits until nothing
// is injected into the process any more, and thaws. What is dropped by then, and
// what is not, is served alike.
Status settle_memory(const Process& process, const Uffd& uffd,
                     const std::vector<ServedRange>& ranges, PageMarks& marks);

}  // namespace vmsnap
