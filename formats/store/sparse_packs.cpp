#include "formats/store/sparse_packs.h"

#include <algorithm>

#include "formats/interrupt.h"
#include "formats/page_entry.h"
#include "formats/store/manifest.h"
#include "formats/store/pack_file.h"

namespace vmsnap {

namespace {

using SparsePacks = std::map<layout::ImageId, SparsePack>;

class Finder {
 public:
  Finder(const Store& store, const RepackOptions& options) : store_(store), options_(options) {}

  Result<SparsePacks> run();

 private:
  Status read_manifests(const std::string& directory, bool to_stay);
  Status look_at(const layout::ImageId& id, SparsePack& pack) const;
  void drop_what_cannot_be();
  Status count(const std::string& path);
  bool is_sparse(uint64_t needed, uint64_t frames) const {
    return static_cast<double>(needed) < options_.below * static_cast<double>(frames);
  }

  const Store& store_;
  const RepackOptions& options_;
  SparsePacks packs_;
  std::map<layout::ImageId, uint64_t> most_;  // page entries of one snapshot that refer to it
  std::set<layout::ImageId> fixed_;           // needed by what must not be written anew
  std::vector<std::string> manifests_;        // paths of those that stay
};

Status Finder::read_manifests(const std::string& directory, bool to_stay) {
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
      SparsePack& pack = packs_[row.id];
      pack.row = row;
      pack.domain = info.domain;
      most_[row.id] = std::max(most_[row.id], row.referenced);
    }
    VMSNAP_CHECK(check_interrupted());
  }
  return {};
}

Status Finder::look_at(const layout::ImageId& id, SparsePack& pack) const {
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
void Finder::drop_what_cannot_be() {
  for (auto pack = packs_.begin(); pack != packs_.end();) {
    bool keep = !fixed_.contains(pack->first);
    if (keep) {
      keep = look_at(pack->first, pack->second) &&
             is_sparse(most_[pack->first], pack->second.frames);
    }
    pack = keep ? std::next(pack) : packs_.erase(pack);
  }
}

Status Finder::count(const std::string& path) {
  const ImageFile manifest = VMSNAP_TRY(store_.open_manifest(path));
  std::vector<SparsePack*> by_number = {nullptr};
  bool any = false;
  for (const layout::PackRow& row : VMSNAP_TRY(manifest.read_packs())) {
    const auto found = packs_.find(row.id);
    by_number.push_back(found == packs_.end() ? nullptr : &found->second);
    any = any || found != packs_.end();
  }
  if (!any) return {};
  return visit_entries(manifest, [&](uint64_t, uint64_t bits) -> Status {
    const PageEntry entry = PageEntry::from_bits(bits);
    if (entry.pack < by_number.size() && by_number[entry.pack]) {
      by_number[entry.pack]->needed.insert(entry.offset);
    }
    return {};
  });
}

Result<SparsePacks> Finder::run() {
  if (options_.below <= 0) return std::move(packs_);
  VMSNAP_CHECK(read_manifests(store_.paths().snapshots(), true));
  VMSNAP_CHECK(read_manifests(store_.paths().trash(), false));
  drop_what_cannot_be();
  while (packs_.size() > options_.max_packs) packs_.erase(std::prev(packs_.end()));
  for (const std::string& path : manifests_) {
    VMSNAP_CHECK(count(path));
    VMSNAP_CHECK(check_interrupted());
  }
  std::erase_if(packs_, [&](const auto& pack) {
    return !is_sparse(pack.second.needed.size(), pack.second.frames);
  });
  return std::move(packs_);
}

}  // namespace

Result<std::map<layout::ImageId, SparsePack>> find_sparse_packs(const Store& store,
                                                                const RepackOptions& options) {
  return Finder(store, options).run();
}

}  // namespace vmsnap
