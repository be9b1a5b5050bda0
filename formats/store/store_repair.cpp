#include "formats/store/store_repair.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <map>
#include <set>
#include <system_error>

#include "formats/damage.h"
#include "formats/file.h"
#include "formats/interrupt.h"
#include "formats/store/content_index.h"
#include "formats/store/manifest.h"
#include "formats/store/pack_check.h"
#include "formats/store/verify_state.h"
#include "formats/test_point.h"

namespace vmsnap {

namespace {

class Repairer {
 public:
  explicit Repairer(const Store& store) : store_(store), paths_(store.paths()) {}

  Result<StoreRepairReport> run();

 private:
  struct Pack {
    std::vector<layout::PackRow> rows;
    std::set<std::string> indexes;  // of the domains that use it
  };

  Status read_manifests(const std::string& directory);
  Status look_at_packs();
  Result<bool> damaged(const layout::ImageId& id, const Pack& pack, bool suspected) const;
  Status quarantine_pack(const layout::ImageId& id);
  Status quarantine_manifest(const std::string& directory, const std::string& id);
  Status move(const std::string& from, const std::string& to) const;
  Status rebuild_indexes();

  template <class... Args>
  void say(fmt::format_string<Args...> format, Args&&... args) {
    report_.sentences.push_back(fmt::format(format, std::forward<Args>(args)...));
  }

  const Store& store_;
  const StorePaths& paths_;
  StoreRepairReport report_;
  std::map<layout::ImageId, Pack> packs_;
  std::set<layout::ImageId> bad_;
};

Result<StoreRepairReport> Repairer::run() {
  VMSNAP_CHECK(read_manifests(paths_.snapshots()));
  VMSNAP_CHECK(read_manifests(paths_.trash()));
  VMSNAP_CHECK(look_at_packs());
  VMSNAP_CHECK(rebuild_indexes());
  say("The index was made anew: {} frames of {} packs.", report_.indexed_frames,
      report_.indexed_packs);
  return std::move(report_);
}

Status Repairer::read_manifests(const std::string& directory) {
  for (const std::string& id : VMSNAP_TRY(manifest_ids(directory))) {
    VMSNAP_CHECK(check_interrupted());
    const auto read = [&]() -> Status {
      const ImageFile manifest = VMSNAP_TRY(store_.open_manifest(directory + "/" + id));
      const ImageInfo info = VMSNAP_TRY(manifest.read_info());
      if (info.id != id) {
        return vmsnap::damaged(manifest.path(), "it is another snapshot than its name says");
      }
      const std::string index = store_.index_name(info.domain);
      for (const layout::PackRow& row : VMSNAP_TRY(manifest.read_packs())) {
        if (row.referenced == 0) continue;
        packs_[row.id].rows.push_back(row);
        packs_[row.id].indexes.insert(index);
      }
      return {};
    }();
    if (read || read.error().os_errno() == ENOENT) continue;
    if (!says_damage(read.error())) return read;
    say("Snapshot {} cannot be read: {}.", id, read.error().message());
    VMSNAP_CHECK(quarantine_manifest(directory, id));
  }
  return {};
}

Status Repairer::look_at_packs() {
  const VerifyState verified = VerifyState::load(paths_);
  for (const auto& [id, pack] : packs_) {
    VMSNAP_CHECK(check_interrupted());
    const auto path = paths_.find_pack(id);
    if (!path) {
      if (!says_damage(path.error())) return tl::unexpected(path.error());
      bad_.insert(id);
      report_.missing_packs.push_back(id);
      say("Pack {} is missing; put it back into {} if there is a copy.", id_text(id),
          paths_.packs());
      continue;
    }
    const auto last = verified.packs.find(id);
    const bool suspected = last != verified.packs.end() && !last->second.ok;
    if (path->starts_with(paths_.quarantine() + "/")) {
      bad_.insert(id);
    } else if (VMSNAP_TRY(damaged(id, pack, suspected))) {
      bad_.insert(id);
      VMSNAP_CHECK(quarantine_pack(id));
    }
  }
  return {};
}

// Without `suspected`, only what is small is read.
Result<bool> Repairer::damaged(const layout::ImageId& id, const Pack& pack, bool suspected) const {
  if (suspected) {
    return !VMSNAP_TRY(check_pack(paths_, id, store_.master(), pack.rows)).whole();
  }
  const auto looked = [&]() -> Result<bool> {
    const auto file = VMSNAP_TRY(open_pack(paths_, id, store_.master()));
    const layout::PackTrailer trailer = VMSNAP_TRY(file->trailer());
    VMSNAP_TRY(file->segments(trailer));
    VMSNAP_TRY(file->frame_table(trailer));
    return std::ranges::find(pack.rows, pack_digest(trailer), &layout::PackRow::digest) ==
           pack.rows.end();
  }();
  if (!looked && says_damage(looked.error())) return true;
  return looked;
}

Status Repairer::quarantine_pack(const layout::ImageId& id) {
  {
    const StoreLock lock = VMSNAP_TRY(StoreLock::commit(paths_));
    VMSNAP_CHECK(move(VMSNAP_TRY(paths_.find_pack(id)), paths_.quarantine() + "/" + id_text(id)));
  }
  report_.quarantined_packs.push_back(id);
  say("Pack {} is damaged, and was put into {}: what is whole in it is still read.", id_text(id),
      paths_.quarantine());
  return {};
}

Status Repairer::quarantine_manifest(const std::string& directory, const std::string& id) {
  const std::string to = paths_.quarantine() + "/" + id + ".manifest";
  {
    const StoreLock lock = VMSNAP_TRY(StoreLock::commit(paths_));
    const Status moved = move(directory + "/" + id, to);
    if (!moved && moved.error().os_errno() == ENOENT) return {};  // removed meanwhile
    VMSNAP_CHECK(moved);
  }
  report_.quarantined_manifests.push_back(id);
  say("Its manifest was moved to {}. Nothing is pruned until you remove it there.", to);
  return {};
}

// Never onto another file: of two damaged copies each may be needed.
Status Repairer::move(const std::string& from, const std::string& to) const {
  VMSNAP_TEST_POINT("repair.quarantining");
  VMSNAP_CHECK(rename_to_new(from, to));
  VMSNAP_CHECK(sync_directory_of(to));
  return sync_directory_of(from);
}

Status Repairer::rebuild_indexes() {
  {
    const StoreLock lock = VMSNAP_TRY(StoreLock::index(paths_));
    std::error_code error;
    std::filesystem::directory_iterator entry(paths_.index(), error);
    for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
      const std::string name = entry->path().filename().string();
      if ((name.ends_with(".hints") || name.ends_with(".packs")) &&
          ::unlink(entry->path().c_str()) < 0 && errno != ENOENT) {
        return fail_errno(errno, "cannot remove {}", entry->path().string());
      }
    }
    if (error) return fail_errno(error.value(), "cannot list {}", paths_.index());
  }
  VMSNAP_TEST_POINT("repair.index_removed");
  for (const auto& [id, pack] : packs_) {
    if (bad_.contains(id)) continue;
    VMSNAP_CHECK(check_interrupted());
    const auto file = VMSNAP_TRY(open_pack(paths_, id, store_.master()));
    const auto frames = VMSNAP_TRY(file->frame_table(VMSNAP_TRY(file->trailer())));
    // For one pack at a time, so that snapshots that end meanwhile need not wait.
    const StoreLock lock = VMSNAP_TRY(StoreLock::index(paths_));
    for (const std::string& index : pack.indexes) {
      VMSNAP_CHECK(ContentIndex::add(paths_, index, id, frames));
    }
    ++report_.indexed_packs;
    report_.indexed_frames += frames.size();
  }
  return {};
}

}  // namespace

Result<StoreRepairReport> repair_store(const Store& store, const StoreRepairOptions& options) {
  const StoreLock lock = VMSNAP_TRY(StoreLock::maintain(store.paths(), options.lock_wait));
  return Repairer(store).run();
}

}  // namespace vmsnap
