// The memory map of a process: /proc/PID/smaps and what lies behind it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "snap/vmm/process.h"
#include "snap/vmm/remote_ptr.h"

namespace vmsnap {

// What stands behind a mapping, as far as userfaultfd(2) makes a difference.
enum class Backing {
  anonymous,        // private, nothing behind: an absent page is zero
  shared_memory,    // MAP_SHARED of memfd or tmpfs
  private_of_file,  // MAP_PRIVATE of memfd or tmpfs: an absent page is the file's
  hugetlb_private,
  hugetlb_shared,
  other,            // a disk file or device: userfaultfd cannot watch it
};

struct Mapping {
  RemoteRange range;
  bool readable = false;
  bool writable = false;
  bool executable = false;
  bool shared = false;
  uint64_t file_offset = 0;
  uint64_t device = 0;  // makedev(3) of the file, 0 for anonymous
  uint64_t inode = 0;
  std::string path = {};  // as proc(5) shows it, maybe empty
  uint64_t page_bytes = 4096;           // KernelPageSize: hugetlb pages are larger
  // Bytes of it that are there, its share of those (PSS), and those that are
  // no page of a file; 0 without smaps.
  uint64_t resident = 0, proportional = 0, anonymous = 0;
  std::vector<std::string> flags = {};  // VmFlags, two letters each; empty without smaps
  Backing backing = Backing::other;

  bool has_flag(std::string_view flag) const;
  bool of_clone() const;
};

// The memfd that clones share: how a VM is known to be one.
constexpr const char* clone_memory_name = "vmsnap-clones";

// All mappings with flags and backing, in address order. Costs a walk over the
// page tables of the process (smaps): not for use inside a pause.
Result<std::vector<Mapping>> read_memory_map(const Process& process);

// /proc/PID/maps alone: no flags, no page_bytes, no backing; cheap.
Result<std::vector<Mapping>> read_memory_map_quick(const Process& process);

// The pieces of `mappings` that cover `range` without a gap, cut to it;
// ErrorCode::refused when part of it is not mapped.
Result<std::vector<Mapping>> mappings_of(const std::vector<Mapping>& mappings, RemoteRange range);

// Opens the file behind a mapping (/proc/PID/map_files). Needs CAP_SYS_ADMIN
// or CAP_CHECKPOINT_RESTORE.
Result<Fd> open_mapped_file(const Process& process, const Mapping& mapping, int flags);

}  // namespace vmsnap
