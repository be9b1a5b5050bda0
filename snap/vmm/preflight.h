// What is looked at before a VM or process is touched, so that nothing is
// captured that would come out wrong.
//
// Each check returns ErrorCode::refused with the reason and the remedy. They
// only read: /proc and query commands of the monitor.
#pragma once

#include <string>
#include <vector>

#include "formats/error.h"
#include "snap/vmm/guest_memory.h"
#include "snap/vmm/process.h"
#include "snap/vmm/qmp.h"

namespace vmsnap {

// "running" or "paused" as query-status says; every other state is refused.
struct GuestState {
  bool running = true;
};
Result<GuestState> check_guest_state(Qmp& qmp);

// No migration under way, and none of the blockers that QEMU reports.
Status check_migration(Qmp& qmp);

// Names of devices with a writable disk in them (query-block).
Result<std::vector<std::string>> writable_disks(Qmp& qmp);

// What pins memory of the process for devices or the kernel, in words: VFIO, RDMA,
// registered io_uring buffers. Writes through it raise no fault. Empty: nothing does.
Result<std::string> find_pinned(const Process& process);
Status check_not_pinned(const Process& process);

// Devices of the host that the guest drives itself (vfio-pci): they go on writing while
// its processors stand still, and their state is not in what QEMU saves.
Status check_no_assigned_devices(Qmp& qmp);

// Requests of Linux AIO or io_uring, which write memory behind the back of a
// process that stands still. For a process, not a VM: QEMU drains its own.
Status check_no_asynchronous_io(const Process& process);

// Shared memory that another process has mapped writable (vhost-user,
// virtiofsd, DPDK), or a private address space that another process shares
// (CLONE_VM): its writes would not be seen. Looks at every process that /proc
// shows.
Status check_not_shared(const Process& process, const GuestMemory& memory);

}  // namespace vmsnap
