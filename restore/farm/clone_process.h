// One clone of a farm, in a process of its own: from nothing to a running guest.
//
// A fresh QEMU waits (vm_start.h), the farm's memory is laid over its RAM
// (memory_overlay.h), and the keeper is told to serve it before the device state is
// loaded. Then it waits for the word to run: guests that run already would slow down
// the start of the others.
#pragma once

#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "formats/image_reader.h"
#include "restore/farm/farm_dir.h"
#include "restore/vm_start.h"

namespace vmsnap {

// To and from the process that starts the farm; both are pipes of its.
struct CloneChannel {
  int report;  // to it: one '+' when the clone is loaded
  int go;      // from it: one byte for each clone is the word to run
};

// Blocks until the guest of clone `name` runs, and says what there is to say of it:
// "pid", "qmp", "run_dir" and "ready_ms" (since `started`), or "error" and "remedy".
// A clone that failed leaves nothing behind, and its number free.
nlohmann::json start_clone(RestoreOptions options, const FarmDir& farm, const std::string& name,
                           std::unique_ptr<ImageReader> image,
                           std::chrono::steady_clock::time_point started, CloneChannel channel);

// "{clone}" in a text becomes the number.
std::string with_clone_number(std::string text, const std::string& number);

}  // namespace vmsnap
