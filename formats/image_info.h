// What an image says of itself, apart from its pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace vmsnap {

inline constexpr uint64_t page_size = 4096;  // the unit of every page number here

// One captured range of memory. Pages of all regions are numbered through, in
// the order of the regions: page `first_page + k` is the 4 KiB at offset
// k * 4096 of the region. A raw export is the pages in this order.
struct Region {
  std::string name;         // RAM block name of a VM; "range0", ... of a process
  uint64_t address = 0;     // guest-physical (lowest mapped) or process address; ~0: not mapped
  uint64_t length = 0;      // bytes, a multiple of page_size, never 0
  uint64_t first_page = 0;  // page number of its first page
};

struct ImageInfo {
  std::string id;               // 32 hex digits, random
  int64_t created_unix_ms = 0;  // the instant of the snapshot, wall clock
  std::vector<Region> regions;
  // Of a snapshot in a store.
  std::string domain;             // pages are shared only within one
  std::vector<std::string> tags;  // the user's words
  uint64_t added_bytes = 0;       // that the store grew by
  // Opaque to formats/: what snap/ recorded of the source (kind, VM name,
  // executable, arguments, ...) and restore/ reads. A JSON object.
  nlohmann::json source = nlohmann::json::object();
};

// What the snapshot is of, as its source's "name" says; empty if it has none.
std::string vm_name(const ImageInfo& info);

// What `vmsnap backup` calls a VM is a tag of its snapshots: the VM's own name
// need be neither there nor the only one. Without such a tag the name is empty;
// of several the last counts.
std::string backup_tag(const std::string& name);
std::string backup_name(const std::vector<std::string>& tags);
bool is_backup_tag(const std::string& tag);

// Sum of all region lengths / page_size.
uint64_t total_pages(const std::vector<Region>& regions);

// The region that holds page number `page`, by its first_page; nullptr if none.
const Region* find_region(const std::vector<Region>& regions, uint64_t page);

}  // namespace vmsnap
