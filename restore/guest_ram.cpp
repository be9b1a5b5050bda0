#include "restore/guest_ram.h"

#include <algorithm>
#include <array>

#include "snap/vmm/pagemap.h"

namespace vmsnap {

namespace {

std::string_view plain_name(std::string_view name) {
  constexpr std::string_view prefix = "/objects/";
  if (name.starts_with(prefix)) name.remove_prefix(prefix.size());
  return name;
}

tl::unexpected<Error> other_machine(std::string what) {
  return tl::unexpected(
      Error(ErrorCode::vm, "the VM that was started is not the machine of the image: " + what)
          .with_remedy("Compare `vmsnap restore --dry-run` with the VM's own command line, and its "
                       "QEMU version with the recorded one."));
}

}  // namespace

Result<std::vector<MemoryBlock>> match_blocks(const std::vector<Region>& regions,
                                              const std::vector<RamBlock>& blocks) {
  std::vector<MemoryBlock> matched;
  for (const Region& region : regions) {
    const auto block = std::find_if(blocks.begin(), blocks.end(), [&](const RamBlock& candidate) {
      return plain_name(candidate.name) == plain_name(region.name);
    });
    if (block == blocks.end()) {
      return other_machine(
          fmt::format("it has no memory block '{}' ({} bytes)", region.name, region.length));
    }
    if (block->length != region.length) {
      return other_machine(fmt::format("its memory block '{}' has {} bytes, the image {}",
                                       region.name, block->length, region.length));
    }
    matched.push_back(
        {region.name, {block->host, region.length}, region.address, region.first_page});
  }
  for (const RamBlock& block : blocks) {
    const bool known = std::any_of(regions.begin(), regions.end(), [&](const Region& region) {
      return plain_name(region.name) == plain_name(block.name);
    });
    if (!known) {
      return other_machine(
          fmt::format("the image has no memory block '{}' ({} bytes)", block.name, block.length));
    }
  }
  return matched;
}

Result<std::vector<ServedRange>> watch_memory(const Uffd& uffd, const Process& process,
                                              std::vector<MemoryBlock> blocks) {
  // The image's order, so that map_guest_memory() numbers pages as the image.
  const GuestMemory memory = VMSNAP_TRY(map_guest_memory(process, std::move(blocks)));
  std::vector<ServedRange> ranges;
  size_t block = 0;
  for (const MemoryPiece& piece : memory.pieces) {
    while (piece.range.start < memory.blocks[block].range.start ||
           piece.range.start >= memory.blocks[block].range.end()) {
      ++block;
    }
    const std::string& name = memory.blocks[block].name;
    const RegisterOutcome outcome = VMSNAP_TRY(uffd.register_range(piece.range, {.missing = true}));
    if (outcome != RegisterOutcome::done || piece.backing == Backing::private_of_file) {
      return tl::unexpected(
          Error(ErrorCode::refused,
                fmt::format("{}: missing pages of memory '{}' cannot be watched{}",
                            process.describe(), name,
                            outcome == RegisterOutcome::busy ? ": another userfaultfd does" : ""))
              .with_remedy("Give the VM plain memory (memory-backend-ram)."));
    }
    ranges.push_back({piece.range, piece.first_page, piece.unit_bytes, name});
  }
  return ranges;
}

namespace {

Status overwrite_run(const Process& process, const ImageReader& image, const ServedRange& range,
                     RemoteRange run, PageMarks& marks) {
  constexpr uint64_t pages_at_once = 64;
  std::array<std::byte, pages_at_once * page_size> buffer;
  for (RemotePtr at = run.start; at < run.end();) {
    const uint64_t pages = std::min(pages_at_once, (run.end() - at) / page_size);
    const uint64_t first = range.page_at(at);
    for (uint64_t i = 0; i < pages; ++i) {
      const std::span<std::byte, page_size> out(buffer.data() + i * page_size, page_size);
      const PageKind kind = VMSNAP_TRY(image.read_page(first + i, out));
      if (kind == PageKind::data) marks.set_resolved(first + i, 1);
    }
    VMSNAP_CHECK(process.write(at, std::span(buffer).first(pages * page_size)));
    at = at + pages * page_size;
  }
  return {};
}

}  // namespace

Result<uint64_t> overwrite_present_pages(const Process& process, const ImageReader& image,
                                         const std::vector<ServedRange>& ranges, PageMarks& marks) {
  const PageMap map = VMSNAP_TRY(PageMap::open(process));
  uint64_t pages = 0;
  for (const ServedRange& range : ranges) {
    for (const RemoteRange& run : VMSNAP_TRY(map.populated(range.range))) {
      VMSNAP_CHECK(overwrite_run(process, image, range, run, marks));
      pages += run.length / page_size;
    }
  }
  return pages;
}

}  // namespace vmsnap
