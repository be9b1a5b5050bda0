// Finds the host addresses of RAM blocks in QEMU's own heap, for versions that
// do not print them (before 8.2).
#pragma once

#include <map>
#include <string>
#include <vector>

#include "formats/error.h"
#include "snap/vmm/memory_map.h"
#include "snap/vmm/process.h"
#include "snap/vmm/ram_blocks.h"

namespace vmsnap {

// Host addresses that QEMU itself told, by block name: the calibration.
using KnownHosts = std::map<std::string, RemotePtr>;

// The address of every block in `lines`. Reads the private writable memory of
// QEMU in pieces of 4 MiB; mappings over 256 MiB and the blocks of `known`, both
// guest RAM, are left out.
// ErrorCode::refused names a block that is not found, or found twice with
// different addresses.
Result<std::map<std::string, RemotePtr>> find_block_hosts(const Process& process,
                                                          const std::vector<Mapping>& mappings,
                                                          const std::vector<RamBlockLine>& lines,
                                                          const KnownHosts& known);

}  // namespace vmsnap
