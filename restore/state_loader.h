// Loading a saved device state into a QEMU that was started with -incoming
// defer.
#pragma once

#include <chrono>
#include <cstddef>
#include <span>

#include "formats/error.h"
#include "snap/vmm/qmp.h"

namespace vmsnap {

// Hands the state over as a file in memory and returns when it is loaded and QEMU
// waits for `cont` (it must have been started with -S). Loading touches guest
// memory: its page server must be running. Blocks up to `limit`. ErrorCode::vm
// with QEMU's reason when it refuses the state, dies or takes too long;
// ErrorCode::interrupted after a signal to us.
Status load_device_state(Qmp& qmp, std::span<const std::byte> state,
                         std::chrono::seconds limit = std::chrono::seconds(60));

}  // namespace vmsnap
