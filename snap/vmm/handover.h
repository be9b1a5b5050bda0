// Getting a userfaultfd out of a process that does not cooperate.
//
// One thread of the process is stopped by ptrace for a few milliseconds and
// runs one system call that makes the descriptor; pidfd_getfd(2) brings it
// over. The other threads run on. If we die meanwhile, the kernel lets the
// thread go; see remote_thread.h for what that can leave behind.
#pragma once

#include <cstdint>

#include "formats/error.h"
#include "snap/vmm/process.h"
#include "snap/vmm/qmp.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

enum class KeepInVmm {
  no,   // capture: when we die, the last descriptor goes, and the VM is free
  yes,  // lazy restore: when we die, the VM must wait and never read zeros
};

struct HandedUffd {
  Uffd uffd;
  int remote_fd = -1;  // number in the VMM where it was kept
};

// `qmp` may be null (a process that is no QEMU). Tries, in this order: QMP
// getfd of /dev/userfaultfd and an injected USERFAULTFD_IOC_NEW; an injected
// userfaultfd(2); /dev/userfaultfd sent over a socket that the process is made
// to connect. ErrorCode::privilege says which privilege was missing where.
Result<HandedUffd> bring_out_uffd(const Process& process, Qmp* qmp, uint64_t features,
                                  KeepInVmm keep);

// Takes over the userfaultfd that the process keeps as `remote_fd`.
// ErrorCode::damaged when that is something else.
Result<Uffd> take_userfaultfd(const Process& process, int remote_fd);

// Closes descriptor `remote_fd` in the process (an injected close(2)).
Status close_in_process(const Process& process, int remote_fd);

}  // namespace vmsnap
