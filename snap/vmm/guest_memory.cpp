#include "snap/vmm/guest_memory.h"

#include <fcntl.h>

#include <algorithm>

namespace vmsnap {

uint64_t GuestMemory::page_count() const {
  return total_pages(regions());
}

bool GuestMemory::has_file() const {
  return std::ranges::any_of(pieces, [](const MemoryPiece& piece) { return piece.file != nullptr; });
}

std::vector<Region> GuestMemory::regions() const {
  std::vector<Region> regions;
  for (const MemoryBlock& block : blocks) {
    regions.push_back({block.name, block.address, block.range.length, block.first_page});
  }
  return regions;
}

namespace {

tl::unexpected<Error> refuse(const Process& process, const MemoryBlock& block, std::string why,
                             std::string remedy) {
  return tl::unexpected(Error(ErrorCode::refused, fmt::format("{}: memory '{}' {}",
                                                              process.describe(), block.name, why))
                            .with_remedy(std::move(remedy)));
}

// smaps shows a registered userfaultfd as um (missing), uw (write-protect) or
// ui (minor faults).
bool is_watched(const Mapping& mapping) {
  return mapping.has_flag("um") || mapping.has_flag("uw") || mapping.has_flag("ui");
}

Status check_piece(const Process& process, const MemoryBlock& block, const Mapping& piece) {
  if (is_watched(piece)) {
    return refuse(process, block, "is watched by another userfaultfd already",
                  "Another snapshot, a lazy restore or a postcopy migration is at work on it: "
                  "wait for it to end.");
  }
  if (piece.backing == Backing::other) {
    return refuse(process, block,
                  fmt::format("is mapped from {}, which userfaultfd cannot watch",
                              piece.path.empty() ? "a device" : piece.path),
                  "Give the VM anonymous, memfd, tmpfs (/dev/shm) or hugetlbfs memory.");
  }
  const uint64_t alignment = piece.page_bytes - 1;
  if ((piece.range.start.address() | piece.range.length) & alignment) {
    return refuse(process, block,
                  fmt::format("starts or ends inside a huge page of {} bytes", piece.page_bytes),
                  "Align the range to the huge page size.");
  }
  return {};
}

}  // namespace

Result<bool> is_watched(const Process& process, const std::vector<MemoryBlock>& blocks) {
  const std::vector<Mapping> mappings = VMSNAP_TRY(read_memory_map(process));
  for (const MemoryBlock& block : blocks) {
    for (const Mapping& mapping : VMSNAP_TRY(mappings_of(mappings, block.range))) {
      if (is_watched(mapping)) return true;
    }
  }
  return false;
}

Status check_not_clone(const Process& process, const std::vector<MemoryBlock>& blocks) {
  const std::vector<Mapping> mappings = VMSNAP_TRY(read_memory_map_quick(process));
  for (const MemoryBlock& block : blocks) {
    for (const Mapping& mapping : VMSNAP_TRY(mappings_of(mappings, block.range))) {
      if (!mapping.of_clone()) continue;
      return refuse(process, block, "is that of a clone",
                    "Clones cannot be snapshotted. Restore the image without --clones for a VM that can.");
    }
  }
  return {};
}

Result<GuestMemory> map_guest_memory(const Process& process, std::vector<MemoryBlock> blocks) {
  const std::vector<Mapping> mappings = VMSNAP_TRY(read_memory_map(process));
  GuestMemory memory;
  uint64_t next_page = 0;
  for (MemoryBlock& block : blocks) {
    block.first_page = next_page;
    auto pieces = mappings_of(mappings, block.range);
    if (!pieces) {
      return tl::unexpected(std::move(pieces).error().with_context(process.describe()));
    }
    for (const Mapping& mapping : *pieces) {
      VMSNAP_CHECK(check_piece(process, block, mapping));
      MemoryPiece piece;
      piece.range = mapping.range;
      piece.first_page = next_page;
      piece.backing = mapping.backing;
      piece.unit_bytes = mapping.page_bytes;
      piece.file_offset = mapping.file_offset;
      // What MAP_ANONYMOUS gives of huge pages has no file that anybody could fill.
      if (piece.shared() || (piece.private_of_file() && !mapping.path.starts_with("/anon_hugepage"))) {
        piece.file = std::make_shared<Fd>(VMSNAP_TRY(open_mapped_file(process, mapping, O_RDONLY)));
      }
      memory.mergeable |= mapping.has_flag("mg");
      next_page += mapping.range.length / page_size;
      memory.pieces.push_back(std::move(piece));
    }
  }
  memory.blocks = std::move(blocks);
  return memory;
}

}  // namespace vmsnap
