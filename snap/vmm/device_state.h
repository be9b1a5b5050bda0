// Taking the device state of a stopped QEMU.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "snap/vmm/qmp.h"

namespace vmsnap {

// A place in memory that QEMU writes its state to, whatever files it may open:
// a memfd handed over with add-fd. Made before the pause, so that the pause
// holds one command only.
class DeviceStateTarget {
 public:
  static Result<DeviceStateTarget> prepare(Qmp& qmp);

  // xen-save-devices-state with live=false (true would inactivate the block
  // devices of a stopped VM). The VM must be stopped. Works on any machine
  // type, in spite of the name. At most 256 MiB.
  Result<std::vector<std::byte>> save(Qmp& qmp);

  // Takes the descriptor back. QEMU closes its copy at once when the VM runs; if it is
  // paused, when the monitor is closed, or when the next of us asks once more.
  Status release(Qmp& qmp);

 private:
  Fd memory_;
  int64_t set_ = -1;
};

}  // namespace vmsnap
