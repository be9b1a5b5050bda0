// The monitor of a VM that libvirt runs, by way of libvirt: QEMU's monitor serves one
// client, which libvirt is, and libvirt passes commands, descriptors and events on.
//
// A process of ours, vmsnap-libvirt-monitor, stands between: QMP at one end of a pair
// of sockets, libvirt's API at the other. vmsnap itself needs no libvirt, and whoever
// holds the socket can go on with it when vmsnap was killed. It ends when nobody holds
// it any more, or when libvirt goes: events may be missing then.
//
// Source: virDomainQemuMonitorCommandWithFiles of libvirt-qemu (libvirt 8.2).
#pragma once

#include <sys/types.h>

#include "formats/error.h"
#include "formats/file.h"
#include "snap/vmm/monitor_address.h"

namespace vmsnap {

class Process;
class Qmp;

// Starts that process and gives the socket, on which its greeting, or an error in its
// place, is to be waited for. ErrorCode::refused if it is not installed.
Result<Fd> start_libvirt_monitor(const MonitorAddress& address);

// Which process QEMU is: the one that has the domain's UUID among its arguments and to
// which a pipe of ours has come over the monitor. ErrorCode::vm if there is none here.
Result<pid_t> find_process_behind(Qmp& qmp);

// Whether it is this one; looks at no other.
Result<bool> is_behind(const Process& process, Qmp& qmp);

}  // namespace vmsnap
