// Putting a private mapping of a file of ours in the place of a VMM's memory,
// so that several VMMs share what none of them has written.
//
// The VMM is to be fresh and waiting (-incoming defer): what its memory held
// is gone. One of its threads runs the system calls (injector.h). The new
// mappings cannot be touched until they are watched: in between, a touch would
// put a page of zeros into the file, for all who share it. They are made
// without access rights, `watch` is called, and only then is access given; a
// VMM that touches one meanwhile dies of SIGSEGV, before its guest ever ran.
//
// The VMM keeps no descriptor of the file: it can neither write to it nor
// punch holes into it. Its memory is marked as QEMU had marked it (not
// inherited by fork, not dumped, mergeable).
//
// Sources: mmap(2), madvise(2); that QEMU discards file-backed RAM by
// fallocate(2) on the file: ram_block_discard_range() of QEMU 7.2.
#pragma once

#include <functional>
#include <vector>

#include "formats/error.h"
#include "snap/vmm/process.h"
#include "snap/vmm/qmp.h"
#include "snap/vmm/remote_ptr.h"

namespace vmsnap {

struct Overlay {
  RemoteRange range;    // mapped memory of the VMM, whole pages of 4 KiB
  uint64_t offset = 0;  // in the file
};

// `file` is open for reading only; its pages must be absent. `watch` registers
// the ranges with a userfaultfd, in this process. ErrorCode::vm when the VMM
// ends or takes no descriptor over its monitor, and the errors of `watch`: the
// VMM is of no use then. Blocks for some milliseconds.
Status overlay_memory(const Process& process, Qmp& qmp, int file,
                      const std::vector<Overlay>& overlays, const std::function<Status()>& watch);

}  // namespace vmsnap
