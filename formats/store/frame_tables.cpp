#include "formats/store/frame_tables.h"

#include <algorithm>

#include "formats/store/pack_check.h"

namespace vmsnap {

Result<bool> FrameTables::begins(const layout::ImageId& pack, uint64_t offset) {
  auto found = tables_.find(pack);
  if (found == tables_.end()) {
    Table table;
    VMSNAP_CHECK(load(pack, table));
    bytes_ += table.offsets.size() * sizeof(uint32_t);
    while (bytes_ > max_bytes && !tables_.empty()) {
      const auto oldest = std::ranges::min_element(
          tables_, {}, [](const auto& entry) { return entry.second.used; });
      bytes_ -= oldest->second.offsets.size() * sizeof(uint32_t);
      tables_.erase(oldest);
    }
    found = tables_.emplace(pack, std::move(table)).first;
  }
  found->second.used = ++uses_;
  return offset <= layout::max_pack_bytes && offset % layout::frame_alignment == 0 &&
         std::ranges::binary_search(found->second.offsets,
                                    static_cast<uint32_t>(offset / layout::frame_alignment));
}

Status FrameTables::load(const layout::ImageId& id, Table& table) {
  const auto pack = VMSNAP_TRY(open_pack(paths_, id, master_));
  const auto frames = VMSNAP_TRY(pack->frame_table(VMSNAP_TRY(pack->trailer())));
  table.offsets.reserve(frames.size());
  for (const layout::PackFrame& frame : frames) {
    table.offsets.push_back(static_cast<uint32_t>(frame.offset / layout::frame_alignment));
  }
  return {};
}

}  // namespace vmsnap
