#include "snap/vmm/memory_map.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <sstream>

namespace vmsnap {

bool Mapping::of_clone() const {
  return path.starts_with(fmt::format("/memfd:{}", clone_memory_name));
}

bool Mapping::has_flag(std::string_view flag) const {
  return std::find(flags.begin(), flags.end(), flag) != flags.end();
}

namespace {

// "55d0-55e0 rw-p 00001000 fe:00 1234    /path", the line that starts each
// mapping in proc(5) maps and smaps. False for the lines between.
bool parse_header(const std::string& line, Mapping& mapping) {
  uint64_t start = 0, end = 0, offset = 0, inode = 0;
  unsigned device_major = 0, device_minor = 0;
  char permissions[5] = {};
  int path_at = 0;
  if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64 " %n", &start,
                  &end, permissions, &offset, &device_major, &device_minor, &inode, &path_at) != 7 ||
      end <= start) {
    return false;
  }
  mapping = Mapping();
  mapping.range = {RemotePtr(start), end - start};
  mapping.readable = permissions[0] == 'r';
  mapping.writable = permissions[1] == 'w';
  mapping.executable = permissions[2] == 'x';
  mapping.shared = permissions[3] == 's';
  mapping.file_offset = offset;
  mapping.device = makedev(device_major, device_minor);
  mapping.inode = inode;
  if (path_at > 0 && static_cast<size_t>(path_at) < line.size()) mapping.path = line.substr(path_at);
  return true;
}

// tmpfs and memfd files can be watched; so can hugetlbfs ones, recognised by
// the "ht" flag before this is asked.
bool is_shared_memory_file(const Process& process, const Mapping& mapping) {
  struct statfs about = {};
  const std::string link = fmt::format("/proc/{}/map_files/{:x}-{:x}", process.pid(),
                                       mapping.range.start.address(), mapping.range.end().address());
  return ::statfs(link.c_str(), &about) == 0 && about.f_type == TMPFS_MAGIC;
}

Backing classify(const Process& process, const Mapping& mapping) {
  if (mapping.has_flag("ht")) {
    return mapping.shared ? Backing::hugetlb_shared : Backing::hugetlb_private;
  }
  if (mapping.inode == 0) {
    // [vvar], [vsyscall] and device mappings have no anonymous pages.
    const bool special = mapping.has_flag("io") || mapping.has_flag("pf") || mapping.shared;
    return special ? Backing::other : Backing::anonymous;
  }
  if (!is_shared_memory_file(process, mapping)) return Backing::other;
  return mapping.shared ? Backing::shared_memory : Backing::private_of_file;
}

// Of a line of smaps that is a size.
void set_size(Mapping& mapping, std::string_view field, uint64_t bytes) {
  if (field == "KernelPageSize" && bytes >= 4096) mapping.page_bytes = bytes;
  if (field == "Rss") mapping.resident = bytes;
  if (field == "Pss") mapping.proportional = bytes;
  if (field == "Anonymous") mapping.anonymous = bytes;
}

Result<std::vector<Mapping>> parse(const Process& process, const char* file) {
  std::istringstream text(VMSNAP_TRY(
      read_small_file(fmt::format("/proc/{}/{}", process.pid(), file), 256 << 20)));
  std::vector<Mapping> mappings;
  Mapping header;
  char field[32];
  for (std::string line; std::getline(text, line);) {
    if (parse_header(line, header)) {
      mappings.push_back(std::move(header));
    } else if (mappings.empty()) {
      continue;
    } else if (uint64_t kib = 0; std::sscanf(line.c_str(), "%31[A-Za-z]: %" SCNu64 " kB", field, &kib) == 2) {
      set_size(mappings.back(), field, kib * 1024);
    } else if (line.starts_with("VmFlags:")) {
      std::istringstream words(line.substr(8));
      for (std::string word; words >> word;) mappings.back().flags.push_back(word);
    }
  }
  return mappings;
}

}  // namespace

Result<std::vector<Mapping>> read_memory_map(const Process& process) {
  std::vector<Mapping> mappings = VMSNAP_TRY(parse(process, "smaps"));
  for (Mapping& mapping : mappings) mapping.backing = classify(process, mapping);
  return mappings;
}

Result<std::vector<Mapping>> read_memory_map_quick(const Process& process) {
  return parse(process, "maps");
}

Result<std::vector<Mapping>> mappings_of(const std::vector<Mapping>& mappings, RemoteRange range) {
  std::vector<Mapping> pieces;
  RemotePtr next = range.start;
  for (const Mapping& mapping : mappings) {
    if (mapping.range.end() <= next) continue;
    if (next >= range.end() || mapping.range.start > next) break;
    Mapping piece = mapping;
    const RemotePtr end = std::min(mapping.range.end(), range.end());
    piece.file_offset += next - mapping.range.start;
    piece.range = {next, end - next};
    pieces.push_back(std::move(piece));
    next = end;
  }
  if (next < range.end()) {
    return fail(ErrorCode::refused, "nothing is mapped at {:#x} (asked for {:#x}-{:#x})",
                next.address(), range.start.address(), range.end().address());
  }
  return pieces;
}

Result<Fd> open_mapped_file(const Process& process, const Mapping& mapping, int flags) {
  // The link's name is the whole mapping, and a piece of one has other bounds:
  // look up where the piece lies now.
  for (const Mapping& whole : VMSNAP_TRY(read_memory_map_quick(process))) {
    if (whole.range.start > mapping.range.start || whole.range.end() < mapping.range.end()) continue;
    return open_file(fmt::format("/proc/{}/map_files/{:x}-{:x}", process.pid(),
                                 whole.range.start.address(), whole.range.end().address()),
                     flags);
  }
  return fail(ErrorCode::vm, "{} has unmapped the memory at {:#x}", process.describe(),
              mapping.range.start.address());
}

}  // namespace vmsnap
