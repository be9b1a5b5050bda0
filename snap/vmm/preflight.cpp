#include "snap/vmm/preflight.h"

#include <linux/kcmp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <charconv>
#include <filesystem>
#include <set>

namespace vmsnap {

using Json = nlohmann::json;
namespace fs = std::filesystem;

namespace {

tl::unexpected<Error> refuse(std::string why, std::string remedy) {
  return tl::unexpected(Error(ErrorCode::refused, std::move(why)).with_remedy(std::move(remedy)));
}

}  // namespace

Result<GuestState> check_guest_state(Qmp& qmp) {
  const Json answer = VMSNAP_TRY(qmp.execute("query-status"));
  const std::string status = answer.is_object() ? text_of(answer, "status") : "";
  if (status == "running") return GuestState{.running = true};
  if (status == "paused") return GuestState{.running = false};
  return refuse(fmt::format("the VM behind {} is in state '{}', which cannot be snapshotted",
                            qmp.name(), status),
                "Bring it to 'running' or 'paused' first.");
}

Status check_migration(Qmp& qmp) {
  const Json answer = VMSNAP_TRY(qmp.execute("query-migrate"));
  if (!answer.is_object()) return fail(ErrorCode::vm, "query-migrate gave no object");
  const std::string status = text_of(answer, "status");
  static const std::set<std::string> idle = {"", "none", "completed", "failed", "cancelled"};
  if (!idle.contains(status)) {
    return refuse(fmt::format("a migration is under way (status '{}')", status),
                  "Wait for it to end or cancel it.");
  }
  const auto blockers = answer.find("blocked-reasons");
  if (blockers != answer.end() && blockers->is_array() && !blockers->empty()) {
    std::string reasons;
    for (const Json& reason : *blockers) {
      if (!reason.is_string()) continue;
      if (!reasons.empty()) reasons += "; ";
      reasons += reason.get<std::string>();
    }
    return refuse("QEMU cannot save the state of this VM: " + reasons,
                  "Remove the device or option it names, then try again.");
  }
  return {};
}

Result<std::vector<std::string>> writable_disks(Qmp& qmp) {
  const Json answer = VMSNAP_TRY(qmp.execute("query-block"));
  if (!answer.is_array()) return fail(ErrorCode::vm, "query-block gave no list");
  std::vector<std::string> names;
  for (const Json& device : answer) {
    const auto inserted = device.find("inserted");
    if (inserted == device.end() || !inserted->is_object() || inserted->value("ro", Json()) == true) continue;
    std::string name = text_of(device, "device");
    if (name.empty()) name = text_of(device, "qdev");
    if (name.empty()) name = text_of(*inserted, "node-name");
    names.push_back(fmt::format("{} ({})", name, text_of(*inserted, "file")));
  }
  return names;
}

Result<std::string> find_pinned(const Process& process) {
  for (const auto& [number, target] : VMSNAP_TRY(process.descriptors())) {
    if (target.starts_with("/dev/vfio/") || target.starts_with("anon_inode:[vfio") ||
        target == "/dev/iommu") {
      return fmt::format("{} uses VFIO (descriptor {} is {})", process.describe(), number, target);
    }
  }
  const std::string pinned = VMSNAP_TRY(process.status_field("VmPin"));
  uint64_t kib = 0;
  std::from_chars(pinned.data(), pinned.data() + pinned.size(), kib);
  return kib > 0 ? fmt::format("{} has {} KiB of memory pinned", process.describe(), kib) : std::string();
}

Status check_not_pinned(const Process& process) {
  std::string why = VMSNAP_TRY(find_pinned(process));
  if (why.empty()) return {};
  return refuse(std::move(why),
                "Devices and the kernel write through pinned memory unseen. Detach VFIO devices and "
                "registered io_uring or RDMA buffers before the snapshot; or, if QEMU itself uses them "
                "and rests when it is stopped, give --copy-pinned.");
}

Status check_no_assigned_devices(Qmp& qmp) {
  for (const char* where : {"/machine/peripheral", "/machine/peripheral-anon"}) {
    const Json devices = VMSNAP_TRY(qmp.execute("qom-list", {{"path", where}}));
    if (!devices.is_array()) return fail(ErrorCode::vm, "qom-list gave no list");
    for (const Json& device : devices) {
      const std::string type = text_of(device, "type");
      if (!type.starts_with("child<vfio-")) continue;
      return refuse(fmt::format("device '{}' of the VM is the host's ({})", text_of(device, "name"), type),
                    "It writes while the VM stands still, and its state would not be in the image. "
                    "Unplug it before the snapshot.");
    }
  }
  return {};
}

Status check_no_asynchronous_io(const Process& process) {
  std::string what;
  for (const auto& [number, target] : VMSNAP_TRY(process.descriptors())) {
    if (target == "anon_inode:[io_uring]") what = fmt::format("io_uring (descriptor {})", number);
  }
  for (const Mapping& mapping : VMSNAP_TRY(read_memory_map_quick(process))) {
    if (mapping.path.starts_with("/[aio]")) what = "Linux AIO";
    // One that is used without a descriptor (IORING_REGISTER_RING_FDS).
    if (mapping.path.starts_with("anon_inode:[io_uring]")) what = "io_uring";
  }
  if (what.empty()) return {};
  return refuse(fmt::format("{} uses {}, which may write its memory while it stands still",
                            process.describe(), what),
                "Have it close its io_uring and AIO contexts for the time of the snapshot.");
}

namespace {

// One file, as /proc/PID/maps names it.
using FileKey = std::pair<uint64_t, uint64_t>;  // device, inode

FileKey key_of(const Mapping& mapping) { return {mapping.device, mapping.inode}; }

// The mappings of the memory that a file is behind.
Result<std::vector<Mapping>> mappings_of_files(const std::vector<Mapping>& mappings,
                                               const GuestMemory& memory) {
  std::vector<Mapping> found;
  for (const MemoryPiece& piece : memory.pieces) {
    if (!piece.file) continue;
    for (const Mapping& part : VMSNAP_TRY(mappings_of(mappings, piece.range))) found.push_back(part);
  }
  return found;
}

bool shares_address_space(pid_t a, pid_t b) {
  return ::syscall(SYS_kcmp, a, b, KCMP_VM, 0, 0) == 0;
}

// Another mapping of what `memory` maps, in the same process.
bool is_alias(const Mapping& mapping, const Mapping& memory) {
  const bool overlaps = mapping.file_offset < memory.file_offset + memory.range.length &&
                        memory.file_offset < mapping.file_offset + mapping.range.length;
  const bool same_place = mapping.range.start < memory.range.end() &&
                          memory.range.start < mapping.range.end();
  return key_of(mapping) == key_of(memory) && overlaps && !same_place;
}

tl::unexpected<Error> refuse_shared(const Process& writer, const Process& process, const Mapping& mapping) {
  return refuse(fmt::format("{} has the memory of {} mapped writable too ({})", writer.describe(),
                            process.describe(), mapping.path),
                "What it writes cannot be seen from here. Detach it (vhost-user, virtiofsd, "
                "DPDK), or stop it first.");
}

Status check_no_alias(const Process& process, const std::vector<Mapping>& mappings,
                      const std::vector<Mapping>& memory) {
  for (const Mapping& mapping : mappings) {
    if (!mapping.shared || !mapping.writable) continue;
    for (const Mapping& part : memory) {
      if (is_alias(mapping, part)) return refuse_shared(process, process, mapping);
    }
  }
  return {};
}

}  // namespace

Status check_not_shared(const Process& process, const GuestMemory& memory) {
  const std::vector<Mapping> own = VMSNAP_TRY(read_memory_map_quick(process));
  const std::vector<Mapping> parts = VMSNAP_TRY(mappings_of_files(own, memory));
  VMSNAP_CHECK(check_no_alias(process, own, parts));
  std::set<FileKey> files;
  for (const Mapping& part : parts) files.insert(key_of(part));
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator("/proc", failed)) {
    const std::string name = entry.path().filename().string();
    pid_t pid = 0;
    if (std::from_chars(name.data(), name.data() + name.size(), pid).ec != std::errc()) continue;
    if (pid == process.pid()) continue;
    const auto other = Process::open(pid);
    if (!other) continue;  // it has just ended
    if (shares_address_space(process.pid(), pid)) {
      return refuse(fmt::format("{} runs in the memory of {} too", other->describe(), process.describe()),
                    "Its threads cannot be paused with the others: stop it first.");
    }
    if (files.empty()) continue;
    const auto mappings = read_memory_map_quick(*other);
    if (!mappings) continue;
    for (const Mapping& mapping : *mappings) {
      if (mapping.shared && mapping.writable && files.contains(key_of(mapping))) {
        return refuse_shared(*other, process, mapping);
      }
    }
  }
  if (failed) return fail_errno(failed.value(), "cannot list /proc");
  return {};
}

}  // namespace vmsnap
