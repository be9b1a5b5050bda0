// The RAM blocks of a QEMU: their names, sizes, host addresses and where the
// guest sees them.
//
// QEMU 7.2 has no command that tells a block's host address unless the guest
// has it mapped (gpa2hva); from 8.2 on `info ramblock` tells it. For the older
// ones the block list that QEMU keeps on its heap is found by what
// `info ramblock` prints of each block (offset, used and total length stand
// next to one another, the name follows); the distance to the host address is
// calibrated on the blocks that gpa2hva knows, and every address found this
// way is checked against the memory map. What cannot be established beyond
// doubt is an error, not a guess.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/error.h"
#include "snap/vmm/memory_map.h"
#include "snap/vmm/process.h"
#include "snap/vmm/qmp.h"

namespace vmsnap {

struct RamBlock {
  std::string name;
  RemotePtr host;            // in QEMU
  uint64_t length = 0;       // used length, bytes, multiple of 4096
  // Lowest guest-physical address at which it is mapped, less the offset into
  // the block there; unmapped: no_guest_address.
  uint64_t guest_address = no_guest_address;

  static constexpr uint64_t no_guest_address = ~uint64_t{0};
};

// In guest-physical order, unmapped ones last, by name. Reads a few MiB of
// QEMU's heap; the VM runs on meanwhile.
Result<std::vector<RamBlock>> read_ram_blocks(Qmp& qmp, const Process& process);

// The parsers, apart for tests and fuzzing; text of `info ramblock` and of
// `info mtree -f`.
struct RamBlockLine {
  std::string name;
  uint64_t offset = 0, used = 0, total = 0;  // bytes; offset in QEMU's ram_addr_t space
  uint64_t host = 0;                         // 0 where this QEMU does not print it

  bool operator==(const RamBlockLine&) const = default;
};
Result<std::vector<RamBlockLine>> parse_info_ramblock(const std::string& text);
// What QEMU says now.
Result<std::vector<RamBlockLine>> list_ram_blocks(Qmp& qmp);

struct FlatRange {
  uint64_t start = 0, length = 0;  // guest-physical
  std::string block;               // name of the memory region
  uint64_t offset = 0;             // into the block
};
// RAM and ROM ranges of the flat view of the address space "memory".
Result<std::vector<FlatRange>> parse_info_mtree(const std::string& text);

}  // namespace vmsnap
