#include "snap/vmm/ram_blocks.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <sstream>

#include "snap/vmm/ram_block_finder.h"

namespace vmsnap {

namespace {

// A cursor over the words of one line.
class Words {
 public:
  explicit Words(const std::string& line) : stream_(line) {}

  bool next(std::string& word) { return static_cast<bool>(stream_ >> word); }
  bool next_hex(uint64_t& value) {
    std::string word;
    if (!next(word)) return false;
    char* end = nullptr;
    errno = 0;
    value = std::strtoull(word.c_str(), &end, 16);
    return *end == '\0' && end != word.c_str() && errno == 0;
  }

 private:
  std::istringstream stream_;
};

}  // namespace

Result<std::vector<RamBlockLine>> parse_info_ramblock(const std::string& text) {
  std::vector<RamBlockLine> blocks;
  std::istringstream lines(text);
  std::string line;
  bool has_host = false;
  while (std::getline(lines, line)) {
    if (line.find("Block Name") != std::string::npos) {
      has_host = line.find("HVA") != std::string::npos;
      continue;
    }
    // NAME  4 KiB  0xOFFSET 0xUSED 0xTOTAL [0xHVA RO]; a name may hold blanks,
    // the page size before the first 0x is two words.
    const size_t numbers = line.find(" 0x");
    if (numbers == std::string::npos) continue;
    std::string head = line.substr(0, numbers);
    RamBlockLine block;
    for (int words = 0; words < 2; ++words) {
      head.erase(head.find_last_not_of(' ') + 1);
      const size_t blank = head.rfind(' ');
      if (blank == std::string::npos) break;
      head.erase(blank);
    }
    const size_t first = head.find_first_not_of(' ');
    head.erase(head.find_last_not_of(' ') + 1);
    if (first == std::string::npos || head.empty()) continue;
    block.name = head.substr(first);
    Words words(line.substr(numbers));
    if (!words.next_hex(block.offset) || !words.next_hex(block.used) ||
        !words.next_hex(block.total) || (has_host && !words.next_hex(block.host)) ||
        block.used > block.total) {
      return fail(ErrorCode::vm, "cannot read this line of QEMU's 'info ramblock': {}", line);
    }
    blocks.push_back(std::move(block));
  }
  if (blocks.empty()) return fail(ErrorCode::vm, "QEMU's 'info ramblock' lists no RAM");
  return blocks;
}

Result<std::vector<FlatRange>> parse_info_mtree(const std::string& text) {
  std::vector<FlatRange> ranges;
  std::istringstream lines(text);
  std::string line;
  bool in_memory_view = false;
  while (std::getline(lines, line)) {
    if (line.starts_with("FlatView")) in_memory_view = false;
    if (line.find(" AS \"memory\"") != std::string::npos) in_memory_view = true;
    if (!in_memory_view) continue;
    // "  START-END (prio 0, ram): NAME @OFFSET kvm"; @OFFSET and kvm optional.
    unsigned long long start = 0, end = 0;
    int priority = 0, name_at = 0;
    char type[32] = {};
    if (std::sscanf(line.c_str(), " %llx-%llx (prio %d, %31[^)]): %n", &start, &end, &priority, type,
                    &name_at) != 4 ||
        name_at == 0 || end < start) {
      continue;
    }
    if (std::strcmp(type, "ram") != 0 && std::strcmp(type, "rom") != 0 &&
        std::strcmp(type, "romd") != 0) {
      continue;
    }
    FlatRange range{.start = start, .length = end - start + 1, .block = line.substr(name_at), .offset = 0};
    for (const char* tail : {" kvm", " hvf"}) {
      if (range.block.ends_with(tail)) range.block.resize(range.block.size() - 4);
    }
    const size_t at = range.block.rfind(" @");
    if (at != std::string::npos) {
      range.offset = std::strtoull(range.block.c_str() + at + 2, nullptr, 16);
      range.block.resize(at);
    }
    ranges.push_back(std::move(range));
  }
  if (ranges.empty()) return fail(ErrorCode::vm, "QEMU's 'info mtree -f' shows no RAM");
  return ranges;
}

namespace {

// Where the guest has something of a block mapped, QEMU tells its host address.
Result<std::optional<RemotePtr>> ask_host_address(Qmp& qmp, const FlatRange& range) {
  const std::string answer = VMSNAP_TRY(qmp.human(fmt::format("gpa2hva {:#x}", range.start)));
  const size_t at = answer.rfind(" is 0x");
  if (at == std::string::npos) return std::optional<RemotePtr>();
  const uint64_t address = std::strtoull(answer.c_str() + at + 4, nullptr, 16);
  if (address < range.offset) return std::optional<RemotePtr>();
  return std::optional<RemotePtr>(RemotePtr(address - range.offset));
}

// The memory region of a block is named as the block's last component:
// "vga.vram" of "0000:00:02.0/vga.vram". Where two blocks end alike (two VGA
// cards), the name says nothing, and neither is taken for mapped here.
const RamBlockLine* block_of(const std::vector<RamBlockLine>& lines, const std::string& region) {
  const RamBlockLine* found = nullptr;
  for (const RamBlockLine& line : lines) {
    if (line.name != region && !line.name.ends_with("/" + region)) continue;
    if (found) return nullptr;
    found = &line;
  }
  return found;
}

// The whole block must lie in readable, writable memory of QEMU.
bool is_mapped(const std::vector<Mapping>& mappings, RemotePtr host, uint64_t length) {
  const auto pieces = mappings_of(mappings, {host, length});
  return host.address() % 4096 == 0 && pieces &&
         std::all_of(pieces->begin(), pieces->end(),
                     [](const Mapping& piece) { return piece.readable && piece.writable; });
}

}  // namespace

Result<std::vector<RamBlockLine>> list_ram_blocks(Qmp& qmp) {
  return parse_info_ramblock(VMSNAP_TRY(qmp.human("info ramblock")));
}

Result<std::vector<RamBlock>> read_ram_blocks(Qmp& qmp, const Process& process) {
  const auto lines = VMSNAP_TRY(list_ram_blocks(qmp));
  const auto view = VMSNAP_TRY(parse_info_mtree(VMSNAP_TRY(qmp.human("info mtree -f"))));
  const auto mappings = VMSNAP_TRY(read_memory_map_quick(process));

  std::map<std::string, uint64_t> guest_addresses;  // by block name
  KnownHosts known;
  for (const FlatRange& range : view) {
    const RamBlockLine* line = block_of(lines, range.block);
    if (!line || range.start < range.offset) continue;
    auto [lowest, first] = guest_addresses.try_emplace(line->name, range.start);
    lowest->second = std::min(lowest->second, range.start);
    if (!first || known.contains(line->name)) continue;
    const auto host = VMSNAP_TRY(ask_host_address(qmp, range));
    if (host && is_mapped(mappings, *host, line->used)) known.emplace(line->name, *host);
  }

  std::map<std::string, RemotePtr> hosts;
  for (const RamBlockLine& line : lines) {
    if (line.host) hosts.emplace(line.name, RemotePtr(line.host));
  }
  if (hosts.size() != lines.size()) {
    auto found = find_block_hosts(process, mappings, lines, known);
    // QEMU's threads use its heap while it is read: a second look may see more.
    if (!found) found = find_block_hosts(process, mappings, lines, known);
    hosts = VMSNAP_TRY(std::move(found));
  }

  std::vector<RamBlock> blocks;
  std::set<RemotePtr> taken;
  for (const RamBlockLine& line : lines) {
    RamBlock block;
    block.name = line.name;
    block.host = hosts.at(line.name);
    block.length = (line.used + 4095) / 4096 * 4096;
    if (const auto at = guest_addresses.find(line.name); at != guest_addresses.end()) {
      block.guest_address = at->second;
    }
    const auto told = known.find(line.name);
    const bool contradicted = told != known.end() && told->second != block.host;
    if (contradicted || !is_mapped(mappings, block.host, block.length) ||
        !taken.insert(block.host).second) {
      return fail(ErrorCode::refused, "{}: RAM block '{}' is not where QEMU's own list has it",
                  process.describe(), line.name);
    }
    if (block.length > 0) blocks.push_back(std::move(block));
  }
  std::sort(blocks.begin(), blocks.end(), [](const RamBlock& a, const RamBlock& b) {
    return std::tie(a.guest_address, a.name) < std::tie(b.guest_address, b.name);
  });
  return blocks;
}

}  // namespace vmsnap
