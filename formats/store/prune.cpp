#include "formats/store/prune.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <set>
#include <system_error>

#include "formats/image_file.h"
#include "formats/interrupt.h"
#include "formats/log.h"
#include "formats/store/pack_file.h"
#include "formats/test_point.h"

namespace vmsnap {

namespace fs = std::filesystem;

namespace {

using PackIds = std::set<layout::ImageId>;

Status rename_durably(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) < 0) {
    return fail_errno(errno, "cannot rename {} to {}", from, to);
  }
  VMSNAP_CHECK(sync_directory_of(to));
  return sync_directory_of(from);
}

uint64_t size_of(const std::string& path) {
  std::error_code error;
  const auto size = fs::file_size(path, error);
  return error ? 0 : size;
}

// A pack that was taken out of sight, and the epoch in which that was.
struct Condemned {
  std::string path;
  uint64_t epoch = 0;
  layout::ImageId id = {};
};

Result<std::vector<Condemned>> list_condemned(const StorePaths& paths) {
  std::vector<Condemned> found;
  std::error_code error;
  fs::directory_iterator entry(paths.condemned(), error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    Condemned pack = {.path = paths.condemned() + "/" + name};
    const size_t dot = name.find('.');
    if (dot == std::string::npos) continue;  // not one of ours
    const auto parsed = std::from_chars(name.data(), name.data() + dot, pack.epoch);
    constexpr uint64_t largest = 1 << 30;  // there are no so many prunes
    if (parsed.ec != std::errc() || parsed.ptr != name.data() + dot || pack.epoch > largest ||
        !parse_id(name.substr(dot + 1), pack.id)) {
      continue;
    }
    found.push_back(std::move(pack));
  }
  if (error) return fail_errno(error.value(), "cannot list {}", paths.condemned());
  return found;
}

class Pruner {
 public:
  Pruner(Store& store, const PruneOptions& options)
      : store_(store), paths_(store.paths()), options_(options) {}

  Result<PruneReport> run();

 private:
  Status list();
  Status check_quarantine() const;
  Status decide();
  Status delete_from_trash();
  Status remove_unkept();
  Status add_needed(const std::string& directory);
  Status free_dead_packs();
  Status condemn_dead_packs();
  Status delete_condemned();
  Status repack_sparse_packs(const RepackOptions& repacking);
  Status delete_working_sets();

  Store& store_;
  const StorePaths& paths_;
  const PruneOptions& options_;
  SnapshotList snapshots_, trash_;
  std::set<std::string> read_;  // manifests whose packs are in needed_
  PackIds needed_;
  PruneReport report_;
};

Status Pruner::list() {
  snapshots_ = VMSNAP_TRY(list_snapshots(store_, Where::snapshots));
  trash_ = VMSNAP_TRY(list_snapshots(store_, Where::trash));
  for (const SnapshotList* list : {&snapshots_, &trash_}) {
    if (list->unreadable.empty()) continue;
    Error error = list->unreadable.front();
    return tl::unexpected(
        std::move(error)
            .with_context("nothing was pruned, since it is not known which packs are needed")
            .with_remedy("Run 'vmsnap repair --store " + paths_.root + "'."));
  }
  return {};
}

// What it needed is not known, but may be found out yet.
Status Pruner::check_quarantine() const {
  std::error_code error;
  fs::directory_iterator entry(paths_.quarantine(), error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (!name.ends_with(".manifest")) continue;
    return tl::unexpected(
        Error(ErrorCode::damaged,
              fmt::format("nothing was pruned, since it is not known which packs {} needs",
                          entry->path().string()))
            .with_remedy("Remove it, if that snapshot is to be given up."));
  }
  if (error && error != std::errc::no_such_file_or_directory) {
    return fail_errno(error.value(), "cannot list {}", paths_.quarantine());
  }
  return {};
}

Status Pruner::decide() {
  if (!options_.keep) {
    report_.kept = snapshots_.snapshots.size();
    return {};
  }
  std::vector<RetentionItem> items;
  for (const SnapshotEntry& entry : snapshots_.snapshots) {
    if (!options_.vm.empty() && !entry.is_of(options_.vm)) continue;
    if (options_.backup_names && !options_.backup_names->contains(backup_name(entry.info.tags))) continue;
    items.push_back({entry.id, entry.group(), entry.info.created_unix_ms, entry.info.tags});
    report_.decisions.push_back({entry, {}});
  }
  if (items.empty() && !options_.vm.empty()) {
    return tl::unexpected(
        Error(ErrorCode::usage,
              fmt::format("there is no snapshot of VM '{}' in the store {}", options_.vm, paths_.root))
            .with_remedy("'vmsnap list --store " + paths_.root + "' shows what there is."));
  }
  const auto decisions = VMSNAP_TRY(apply_keep_rule(items, *options_.keep, options_.now_unix_ms));
  report_.kept = snapshots_.snapshots.size();
  for (size_t i = 0; i < decisions.size(); ++i) {
    report_.decisions[i].decision = decisions[i];
    if (decisions[i].keep) continue;
    --report_.kept;
    ++report_.removed;
  }
  return {};
}

Status Pruner::delete_from_trash() {
  for (const std::string& id : VMSNAP_TRY(manifest_ids(paths_.trash()))) {
    const std::string path = paths_.in_trash(id);
    const uint64_t bytes = size_of(path);
    const StoreLock lock = VMSNAP_TRY(StoreLock::commit(paths_));
    std::error_code error;
    if (!fs::exists(path, error)) continue;  // it was taken back
    const Fd claim = claim_manifest(path);
    if (!claim) {
      ++report_.in_use;
      continue;
    }
    if (::unlink(path.c_str()) < 0) return fail_errno(errno, "cannot remove {}", path);
    VMSNAP_TEST_POINT("prune.manifest_deleted");
    ++report_.deleted;
    report_.freed_bytes += bytes;
  }
  return sync_directory_of(paths_.trash() + "/.");
}

Status Pruner::remove_unkept() {
  for (const PruneReport::Decision& d : report_.decisions) {
    if (d.decision.keep) continue;
    const std::string& id = d.snapshot.id;
    const Status removed = remove_snapshot(store_, id);
    // It is the snapshot that is gone, and not the trash: somebody else removed it.
    const bool is_gone = !removed && removed.error().os_errno() == ENOENT &&
                         ::access(paths_.snapshot(id).c_str(), F_OK) != 0;
    if (!is_gone) VMSNAP_CHECK(removed);
    if (is_gone) --report_.removed;
  }
  return {};
}

// The packs of manifests that were not read yet. One that vanishes meanwhile
// went to the trash, which is read after the snapshots, or back, which makes it
// found in the next call.
Status Pruner::add_needed(const std::string& directory) {
  for (const std::string& id : VMSNAP_TRY(manifest_ids(directory))) {
    if (read_.contains(id)) continue;
    const auto manifest = store_.open_manifest(directory + "/" + id);
    if (!manifest && manifest.error().os_errno() == ENOENT) continue;
    if (!manifest) return tl::unexpected(manifest.error());
    for (const layout::PackRow& row : VMSNAP_TRY(manifest->read_packs())) {
      if (row.referenced != 0) needed_.insert(row.id);
    }
    read_.insert(id);
    VMSNAP_CHECK(check_interrupted());
  }
  return {};
}

Status Pruner::free_dead_packs() {
  needed_.clear();
  read_.clear();
  VMSNAP_CHECK(condemn_dead_packs());
  return delete_condemned();
}

Status Pruner::condemn_dead_packs() {
  // Most of the reading first, so that commits wait for little.
  VMSNAP_CHECK(add_needed(paths_.snapshots()));
  VMSNAP_CHECK(add_needed(paths_.trash()));
  const StoreLock lock = VMSNAP_TRY(StoreLock::commit(paths_));
  // Nothing moves now.
  VMSNAP_CHECK(add_needed(paths_.snapshots()));
  VMSNAP_CHECK(add_needed(paths_.trash()));
  const uint64_t epoch = VMSNAP_TRY(present_epoch(paths_));
  std::vector<layout::ImageId> dead;
  for (const std::string& name : VMSNAP_TRY(manifest_ids(paths_.packs()))) {
    layout::ImageId id;
    if (parse_id(name, id) && !needed_.contains(id)) dead.push_back(id);
  }
  // Who replaced or deleted a manifest may have been killed before that was on
  // the disk, or was told that it is not: a crash would bring back the old one,
  // which needs them.
  if (!dead.empty()) {
    VMSNAP_CHECK(sync_directory_of(paths_.snapshots() + "/."));
    VMSNAP_CHECK(sync_directory_of(paths_.trash() + "/."));
  }
  for (const layout::ImageId& id : dead) {
    const std::string to = fmt::format("{}/{}.{}", paths_.condemned(), epoch, id_text(id));
    if (::rename(paths_.pack(id).c_str(), to.c_str()) < 0) {
      return fail_errno(errno, "cannot rename {} to {}", paths_.pack(id), to);
    }
    VMSNAP_TEST_POINT("prune.pack_condemned");
  }
  // Also for those of a prune that did not get as far as this.
  const auto condemned = VMSNAP_TRY(list_condemned(paths_));
  uint64_t last = 0;
  for (const Condemned& pack : condemned) last = std::max(last, pack.epoch);
  if (condemned.empty() || last < epoch) return {};
  VMSNAP_CHECK(sync_directory_of(paths_.condemned() + "/."));
  VMSNAP_CHECK(sync_directory_of(paths_.packs() + "/."));
  // Whoever begins from now on cannot have seen them.
  VMSNAP_CHECK(end_epoch(paths_, last));
  VMSNAP_TEST_POINT("prune.epoch_ended");
  return {};
}

Status Pruner::delete_condemned() {
  // We began in an epoch, too, and need nothing of it any more.
  VMSNAP_CHECK(store_.begin_again());
  report_.packs_waiting = report_.waiting_bytes = 0;  // those that wait still are counted below
  for (const auto& [path, epoch, id] : VMSNAP_TRY(list_condemned(paths_))) {
    if (needed_.contains(id)) {
      // A crash between two renames: it is needed after all.
      VMSNAP_CHECK(rename_durably(path, paths_.pack(id)));
      continue;
    }
    const uint64_t bytes = size_of(path);
    if (VMSNAP_TRY(epoch_in_use(paths_, epoch))) {
      ++report_.packs_waiting;
      report_.waiting_bytes += bytes;
      continue;
    }
    if (::unlink(path.c_str()) < 0 && errno != ENOENT) {
      return fail_errno(errno, "cannot remove {}", path);
    }
    ++report_.packs_deleted;
    report_.freed_bytes += bytes;
    VMSNAP_TEST_POINT("prune.pack_deleted");
  }
  return {};
}

// Those of snapshots that are neither there nor in the trash.
Status Pruner::delete_working_sets() {
  std::error_code error;
  if (!fs::exists(paths_.working_sets(), error)) return {};
  const std::vector<std::string> recorded = VMSNAP_TRY(manifest_ids(paths_.working_sets()));
  if (recorded.empty()) return {};
  // Nothing is taken back meanwhile.
  const StoreLock lock = VMSNAP_TRY(StoreLock::commit(paths_));
  for (const std::string& id : recorded) {
    if (fs::exists(paths_.snapshot(id), error) || fs::exists(paths_.in_trash(id), error)) continue;
    const std::string path = paths_.working_set(id);
    if (::unlink(path.c_str()) < 0 && errno != ENOENT) {
      return fail_errno(errno, "cannot remove {}", path);
    }
  }
  return {};
}

// What fails here must not keep the space of what is dead: one pack that cannot
// be read would do so for ever.
Status Pruner::repack_sparse_packs(const RepackOptions& repacking) {
  const Status repacked =
      repack(store_, repacking, report_.repacked, [this] { return free_dead_packs(); });
  if (!repacked && repacked.error().code() == ErrorCode::interrupted) return repacked;
  if (!repacked) VMSNAP_CHECK(free_dead_packs());  // of what was done before
  if (repacked || repacked.error().code() != ErrorCode::no_space) return repacked;
  log_warning("not repacked, which needs some space: {}; make room, or leave it out with "
              "--repack-below 0",
              repacked.error().message());
  return {};
}

Result<PruneReport> Pruner::run() {
  const StoreLock lock = VMSNAP_TRY(StoreLock::maintain(paths_, options_.lock_wait));
  VMSNAP_CHECK(list());
  VMSNAP_CHECK(check_quarantine());
  VMSNAP_CHECK(decide());
  RepackOptions repacking;
  repacking.below = options_.repack_below;
  repacking.dry_run = options_.dry_run;
  if (options_.dry_run) {
    for (const PruneReport::Decision& d : report_.decisions) {
      if (!d.decision.keep) repacking.leaving.insert(d.snapshot.id);
    }
    VMSNAP_CHECK(repack(store_, repacking, report_.repacked, [] { return Status(); }));
    return std::move(report_);
  }
  remove_abandoned(paths_.temporary());
  if (options_.empty_trash) VMSNAP_CHECK(remove_unkept());
  VMSNAP_CHECK(delete_from_trash());
  if (!options_.empty_trash) VMSNAP_CHECK(remove_unkept());
  VMSNAP_CHECK(delete_working_sets());
  // What is dead goes first: on a full disk that is the room for the rest.
  VMSNAP_CHECK(free_dead_packs());
  VMSNAP_CHECK(repack_sparse_packs(repacking));
  return std::move(report_);
}

}  // namespace

Status remove_snapshot(const Store& store, const std::string& id) {
  const StoreLock lock = VMSNAP_TRY(StoreLock::commit(store.paths()));
  return rename_durably(store.paths().snapshot(id), store.paths().in_trash(id));
}

Status undelete_snapshot(const Store& store, const std::string& id) {
  const StoreLock lock = VMSNAP_TRY(StoreLock::commit(store.paths()));
  return rename_durably(store.paths().in_trash(id), store.paths().snapshot(id));
}

Result<PruneReport> prune(Store& store, const PruneOptions& options) {
  return Pruner(store, options).run();
}

}  // namespace vmsnap
