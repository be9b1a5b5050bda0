// From the command line of a VM that was snapshotted to the command line that
// starts it again, beside the original if that still runs. A pure function.
//
// The rules, by option of the recorded command line (also listed in vmsnap(1)):
//
//   -incoming -loadvm -S -daemonize   dropped; ours are -incoming defer and -S,
//                                     and what the saved state needs to load:
//                                     -global migration.send-configuration=off
//   -pidfile                          DIR/qemu.pid
//   -qmp -qmp-pretty                  unix:DIR/qmp.sock
//   -monitor                          none
//   -gdb -s -qtest -qtest-log         dropped
//   -D                                dropped: messages go to DIR/qemu.log
//   -trace                            its file= dropped
//   -mem-path -mem-prealloc           dropped
//   -overcommit                       its mem-lock= dropped
//   -object memory-backend-file,      memory-backend-ram of the same id and
//     -memfd, -ram                    size, private, not preallocated
//   -object filter-dump               its file= is /dev/null
//   -machine -M                       the versioned type that ran, if recorded
//   -serial -parallel -debugcon       file:DIR/serialN.log, parallelN.log,
//                                     debugcon.log; none, null, chardev:ID stay
//   no -serial, no -nodefaults        -serial file:DIR/serial0.log
//   -display -vnc -spice -sdl ...     -display none (-nographic stays)
//   -audiodev -audio spice, dbus, wav none
//   -device vmgenid                   guid=auto: a new generation
//   -device with pcap=                pcap= dropped
//   -icount rr=record                 rrfile=DIR/replay.bin
//   -chardev socket, udp, pty         a listening socket DIR/ID.sock
//   -chardev file, pipe, stdio        DIR/ID.log
//   -chardev null, ringbuf, vc ...    stay; every other kind becomes null
//   -netdev -nic -net                 hostfwd= and guestfwd= dropped; a unix
//                                     socket that it listens on: DIR/net-ID.sock
//   -object secret                    dropped if nothing else names it (libvirt's
//                                     masterKey0, whose file goes with the VM)
//   -add-fd                           dropped if nothing names its set any more,
//                                     else an error, unless replaced (below)
//   fd= fds= vhostfd= ...             an error, unless replaced
//   -readconfig                       an error, unless replaced: what is in the
//                                     file is not seen here
//   -blockdev, with replacements      its backing=null dropped: the file that takes
//                                     the place of the disk's may be an overlay
//   -set GROUP.ID.KEY=VALUE           written into the option that it changes
//   anything else                     stays, with its value
//
// An option of the extra arguments that names the same thing as a recorded one
// (the id of a -netdev, -chardev, -device, -drive, -object, -audiodev, -fsdev,
// -tpmdev; the node-name of a -blockdev; the set of an -add-fd) takes its
// place, where it stood, so that devices keep their order; a -readconfig takes
// the place of all recorded ones. The other extra arguments come last.
//
// Disks stay as they are: QEMU's file locks keep a restored VM from opening the
// disk of an original that still runs. Replacements (--replace OLD=NEW) change
// the text of recorded arguments before any rule is applied.
#pragma once

#include <string>
#include <vector>

#include "formats/error.h"
#include "snap/vmm/vm_record.h"

namespace vmsnap {

struct Replacement {
  std::string from;  // not empty
  std::string to;
};

// "OLD=NEW", split at the first '='. ErrorCode::usage.
Result<Replacement> parse_replacement(const std::string& text);

struct LaunchRequest {
  VmRecord record;
  std::string run_dir;            // absolute
  std::string executable;         // empty: the recorded one
  std::string working_directory;  // empty: the recorded one ("/" after -daemonize)
  std::vector<Replacement> replacements;
  std::vector<std::string> extra;  // after "--" on our own command line
};

struct LaunchLine {
  std::string executable;
  std::vector<std::string> arguments;  // argv, argv[0] included
  std::string working_directory;
};

// ErrorCode::damaged for a record without arguments; ErrorCode::usage for what
// the user must replace or shorten. Blocks nothing.
Result<LaunchLine> derive_launch_line(const LaunchRequest& request);

// One argument as a POSIX shell would have to read it.
std::string shell_quoted(std::string_view argument);
std::string shell_quoted(const LaunchLine& line);

}  // namespace vmsnap
