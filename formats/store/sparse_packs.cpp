#include "formats/store/sparse_packs.h"

#include <algorithm>
#include <cerrno>

#include "formats/interrupt.h"
#include "formats/page_entry.h"
#include "formats/store/manifest.h"
#include "formats/store/pack_file.h"

namespace vmsnap {

Status SparsePackFinder::read_manifests(const std::string& directory, bool to_stay) {
  for (const std::string& id : VMSNAP_TRY(manifest_ids(directory))) {
    const std::string path = directory + "/" + id;
    const auto manifest = store_.open_manifest(path);
    if (!manifest && manifest.error().os_errno() == ENOENT) continue;
    if (!manifest) return tl::unexpected(manifest.error());
    const bool fixed = !to_stay || options_.leaving.contains(id) || manifest_in_use(path);
    if (!fixed) manifests_.push_back(path);
    const ImageInfo info = VMSNAP_TRY(manifest->read_info());
    for (const layout::PackRow& row : VMSNAP_TRY(manifest->read_packs())) {
      if (row.referenced == 0) continue;
      if (fixed) {
        fixed_.insert(row.id);
        continue;
      }
      SparsePack& pack = candidates_[row.id];
      pack.row = row;
      pack.domain = info.domain;
      most_[row.id] = std::max(most_[row.id], row.referenced);
    }
    VMSNAP_CHECK(check_interrupted());
  }
  return {};
}

Status SparsePackFinder::look_at(const layout::ImageId& id, SparsePack& pack) const {
  const auto file =
      VMSNAP_TRY(PackFile::open(store_.paths().pack(id), id, store_.master()));
  pack.frames = VMSNAP_TRY(file->trailer()).frame_count;
  pack.bytes = file->length();
  pack.deltas = file->may_have_deltas();
  return {};
}

// One snapshot alone may need enough of it. And only a whole pack under its own
// name can be moved: not one in quarantine, nor one that is missing or damaged,
// of which verify tells.
void SparsePackFinder::drop_what_cannot_be() {
  for (auto at = candidates_.begin(); at != candidates_.end();) {
    auto& [id, pack] = *at;
    const bool may_be =
        !fixed_.contains(id) && look_at(id, pack) && is_sparse(most_[id], pack.frames);
    at = may_be ? std::next(at) : candidates_.erase(at);
  }
}

Result<SparsePackFinder> SparsePackFinder::create(const Store& store, const RepackOptions& options) {
  SparsePackFinder finder(store, options);
  if (options.below <= 0) return finder;
  VMSNAP_CHECK(finder.read_manifests(store.paths().snapshots(), true));
  VMSNAP_CHECK(finder.read_manifests(store.paths().trash(), false));
  finder.drop_what_cannot_be();
  return finder;
}

SparsePacks SparsePackFinder::next_candidates() {
  SparsePacks next;
  for (uint64_t bytes = 0; !candidates_.empty() && bytes < options_.batch_bytes;) {
    const auto taken = next.insert(candidates_.extract(candidates_.begin()));
    bytes += taken.position->second.bytes;
  }
  return next;
}

// `seen`: for each pack a bit for each place where a frame may begin.
Status SparsePackFinder::count(const std::string& path, SparsePacks& packs,
                               std::map<layout::ImageId, std::vector<bool>>& seen) const {
  const auto manifest = store_.open_manifest(path);
  if (!manifest && manifest.error().os_errno() == ENOENT) return {};  // removed meanwhile
  if (!manifest) return tl::unexpected(manifest.error());
  struct Counted {
    SparsePack* pack = nullptr;
    std::vector<bool>* seen = nullptr;
  };
  std::vector<Counted> by_number = {{}};
  bool any = false;
  for (const layout::PackRow& row : VMSNAP_TRY(manifest->read_packs())) {
    const auto found = packs.find(row.id);
    by_number.push_back(found == packs.end() ? Counted() : Counted{&found->second, &seen[row.id]});
    any = any || found != packs.end();
  }
  if (!any) return {};
  return visit_entries(*manifest, [&](uint64_t, uint64_t bits) -> Status {
    const PageEntry entry = PageEntry::from_bits(bits);
    if (entry.pack >= by_number.size() || !by_number[entry.pack].pack) return {};
    const auto [pack, places] = by_number[entry.pack];
    const uint64_t place = entry.offset / layout::frame_alignment;
    if (place >= places->size() || (*places)[place]) return {};
    (*places)[place] = true;
    ++pack->needed;
    return {};
  });
}

Result<SparsePacks> SparsePackFinder::next() {
  while (!candidates_.empty()) {
    SparsePacks packs = next_candidates();
    std::map<layout::ImageId, std::vector<bool>> seen;
    for (const auto& [id, pack] : packs) seen[id].resize(pack.bytes / layout::frame_alignment);
    for (const std::string& path : manifests_) {
      VMSNAP_CHECK(count(path, packs, seen));
      VMSNAP_CHECK(check_interrupted());
    }
    std::erase_if(packs, [&](const auto& pack) {
      return !is_sparse(pack.second.needed, pack.second.frames);
    });
    if (!packs.empty()) return packs;
  }
  return SparsePacks();
}

}  // namespace vmsnap
