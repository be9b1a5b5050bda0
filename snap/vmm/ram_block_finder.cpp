#include "snap/vmm/ram_block_finder.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <set>

#include "snap/vmm/pagemap.h"

namespace vmsnap {

namespace {

// In QEMU, a block is described by a structure (RAMBlock, include/exec/
// ramblock.h) in which offset, used length and total length are three words in
// a row. The host address stands a few words before them, the name within the
// next few hundred bytes. How many words before differs with the version.
constexpr size_t words_before = 8;
constexpr size_t bytes_after = 512;
constexpr size_t piece_bytes = 4 << 20;
constexpr uint64_t largest_heap_mapping = 256 << 20;

// One place in QEMU's memory that looks like the description of a block.
struct Candidate {
  std::string name;
  std::array<uint64_t, words_before> before;  // before[k]: k+1 words before the offset
};

class CandidateSearch {
 public:
  explicit CandidateSearch(const std::vector<RamBlockLine>& lines) : lines_(lines) {
    for (const RamBlockLine& line : lines) length_bits_ |= line.used | line.total;
  }

  // All of the run is present.
  void read(const Process& process, RemoteRange run) {
    // Pieces overlap, so that nothing is cut in two.
    constexpr uint64_t overlap = words_before * 8 + bytes_after;
    for (uint64_t offset = 0; offset < run.length; offset += piece_bytes - overlap) {
      const uint64_t length = std::min<uint64_t>(piece_bytes, run.length - offset);
      const auto piece = std::span(buffer_).subspan(words_before * 8, length);
      const auto behind = std::span(buffer_).subspan(words_before * 8 + length, bytes_after);
      std::fill(behind.begin(), behind.end(), std::byte{0});
      // The heap may shrink under us; what is gone cannot hold the list.
      if (!process.read(run.start + offset, piece)) continue;
      look_through(std::span(buffer_).first(words_before * 8 + length + bytes_after));
    }
  }

  const std::vector<Candidate>& found() const { return found_; }

 private:
  // `bytes` starts at a multiple of 8.
  void look_through(std::span<const std::byte> bytes) {
    const size_t first = words_before * 8;
    for (size_t at = first; at + bytes_after <= bytes.size(); at += 8) {
      std::array<uint64_t, 3> words;
      std::memcpy(words.data(), bytes.data() + at, sizeof words);
      // Most words are no lengths of blocks, which are multiples of some pages.
      if (words[2] == 0 || ((words[1] | words[2]) & ~length_bits_) != 0) continue;
      for (const RamBlockLine& line : lines_) {
        if (words[0] != line.offset || words[1] != line.used || words[2] != line.total) continue;
        if (name_follows(bytes.subspan(at, bytes_after), line.name)) add(bytes, at, line.name);
      }
    }
  }

  static bool name_follows(std::span<const std::byte> bytes, const std::string& name) {
    const auto* begin = reinterpret_cast<const char*>(bytes.data());
    const std::string_view text(begin, bytes.size());
    return text.find(std::string_view(name.c_str(), name.size() + 1)) != std::string_view::npos;
  }

  void add(std::span<const std::byte> bytes, size_t at, const std::string& name) {
    Candidate candidate{.name = name, .before = {}};
    for (size_t k = 0; k < words_before; ++k) {
      std::memcpy(&candidate.before[k], bytes.data() + at - 8 * (k + 1), 8);
    }
    found_.push_back(std::move(candidate));
  }

  const std::vector<RamBlockLine>& lines_;
  uint64_t length_bits_ = 0;  // that some length has
  // Zeros on both sides: what absent memory next to a run would read as. A block
  // at the end of the heap is described right where the run ends.
  std::vector<std::byte> buffer_ = std::vector<std::byte>(words_before * 8 + piece_bytes + bytes_after);
  std::vector<Candidate> found_;
};

bool may_be_heap(const Mapping& mapping) {
  // Executable memory is where TCG keeps the code it makes: large, and no heap.
  return mapping.readable && mapping.writable && !mapping.executable && !mapping.shared &&
         mapping.inode == 0 && mapping.range.length <= largest_heap_mapping &&
         mapping.path != "[stack]";
}

// What of a mapping is no block whose address is known: that is the guest's, and
// could hold anything.
std::vector<RemoteRange> without_blocks(RemoteRange range, const std::vector<RamBlockLine>& lines,
                                        const KnownHosts& known) {
  std::map<RemotePtr, RemotePtr> blocks;  // start, end
  for (const RamBlockLine& line : lines) {
    const auto host = known.find(line.name);
    if (host != known.end()) blocks.emplace(host->second, host->second + line.total);
  }
  std::vector<RemoteRange> left;
  RemotePtr from = range.start;
  const auto up_to = [&](RemotePtr end) {
    if (from < end) left.push_back({from, end - from});
  };
  for (const auto& [start, end] : blocks) {
    up_to(std::min(start, range.end()));
    from = std::max(from, end);
  }
  up_to(range.end());
  return left;
}

// How many words before the offset the host address stands: the one distance
// at which every block whose address QEMU told has it.
std::optional<size_t> calibrate(const std::vector<Candidate>& candidates, const KnownHosts& known) {
  std::optional<size_t> distance;
  for (size_t k = 0; k < words_before; ++k) {
    std::set<std::string> confirmed;
    for (const Candidate& candidate : candidates) {
      const auto told = known.find(candidate.name);
      if (told != known.end() && candidate.before[k] == told->second.address()) {
        confirmed.insert(candidate.name);
      }
    }
    if (known.empty() || confirmed.size() != known.size()) continue;
    if (distance) return std::nullopt;
    distance = k;
  }
  return distance;
}

tl::unexpected<Error> not_found(const Process& process, const std::string& what) {
  return tl::unexpected(
      Error(ErrorCode::refused, fmt::format("{}: {}", process.describe(), what))
          .with_remedy("vmsnap needs 'info ramblock' to print host addresses (QEMU 8.2 and "
                       "newer), or a QEMU whose RAM block list it can find (tried on 7.2)."));
}

}  // namespace

Result<std::map<std::string, RemotePtr>> find_block_hosts(const Process& process,
                                                          const std::vector<Mapping>& mappings,
                                                          const std::vector<RamBlockLine>& lines,
                                                          const KnownHosts& known) {
  const PageMap page_map = VMSNAP_TRY(PageMap::open(process));
  CandidateSearch search(lines);
  for (const Mapping& mapping : mappings) {
    if (!may_be_heap(mapping)) continue;
    for (const RemoteRange& part : without_blocks(mapping.range, lines, known)) {
      // Reading an absent page would make it present: of a guest's memory, too,
      // which looks like a heap when it is small.
      for (const RemoteRange& run : VMSNAP_TRY(page_map.populated(part))) search.read(process, run);
    }
  }

  const auto distance = calibrate(search.found(), known);
  if (!distance) return not_found(process, "cannot find QEMU's list of RAM blocks in its memory");

  std::map<std::string, RemotePtr> hosts;
  for (const Candidate& candidate : search.found()) {
    const RemotePtr host(candidate.before[*distance]);
    const auto told = known.find(candidate.name);
    if (told != known.end() && told->second != host) continue;  // a stale copy of the structure
    const auto [place, first] = hosts.emplace(candidate.name, host);
    if (!first && place->second != host) {
      return not_found(process,
                       fmt::format("RAM block '{}' has two host addresses", candidate.name));
    }
  }
  for (const RamBlockLine& line : lines) {
    if (!hosts.contains(line.name)) {
      return not_found(process,
                       fmt::format("cannot find the host address of RAM block '{}'", line.name));
    }
  }
  return hosts;
}

}  // namespace vmsnap
