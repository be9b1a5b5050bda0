// What a snapshot records of a VM, and what a restore needs to start it again:
// the "source" object of an image's metadata (vmsnap-image(5)).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "formats/error.h"

namespace vmsnap {

struct VmRecord {
  std::string name;                    // -name, or the executable's name
  std::string executable;              // absolute path
  std::vector<std::string> arguments;  // argv, argv[0] included
  std::string working_directory;
  std::string machine;       // versioned machine type, "pc-i440fx-7.2"; may be empty
  std::string qemu_version;  // "7.2.22", for messages
  bool was_running = true;   // false: it was paused when the snapshot was taken
};

// kind is "qemu"; "process" for --pid images, which restore refuses.
nlohmann::json to_json(const VmRecord& record);
// ErrorCode::refused for an image of a process, ErrorCode::damaged for an
// object that is not as described.
Result<VmRecord> vm_record_from_json(const nlohmann::json& source);

}  // namespace vmsnap
