#include "formats/store/repair.h"

#include <stdio.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <set>

#include "formats/image_file.h"
#include "formats/interrupt.h"
#include "formats/store/content_index.h"
#include "formats/store/manifest.h"
#include "formats/store/pack_file.h"
#include "formats/store/store_verify.h"
#include "formats/test_point.h"

namespace vmsnap {

namespace {

Status quarantine(const Store& store, const std::string& from, const std::string& name) {
  const StoreLock lock = VMSNAP_TRY(StoreLock::commit(store.paths()));
  const std::string to = store.paths().quarantine() + "/" + name;
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) < 0) {
    if (errno == ENOENT) return {};  // removed meanwhile
    return fail_errno(errno, "cannot rename {} to {}", from, to);
  }
  VMSNAP_TEST_POINT("repair.quarantined");
  VMSNAP_CHECK(sync_directory_of(to));
  return sync_directory_of(from);
}

Status quarantine_manifests(const Store& store, RepairReport& report) {
  for (const std::string& directory : {store.paths().snapshots(), store.paths().trash()}) {
    for (const std::string& id : VMSNAP_TRY(manifest_ids(directory))) {
      const std::string path = directory + "/" + id;
      const auto manifest = store.open_manifest(path);
      const auto info = manifest ? manifest->read_info() : tl::unexpected<Error>(manifest.error());
      if (info || info.error().code() != ErrorCode::damaged) continue;
      VMSNAP_CHECK(quarantine(store, path, id + ".manifest"));
      report.done.push_back(fmt::format("moved the manifest of snapshot {} to quarantine: {}", id,
                                        info.error().message()));
    }
  }
  return {};
}

// The index of every domain that a snapshot has, from the packs' own tables.
Status rebuild_indexes(const Store& store, RepairReport& report) {
  std::map<std::string, std::set<layout::ImageId>> packs_of;
  for (const Where where : {Where::snapshots, Where::trash}) {
    for (const SnapshotEntry& entry : VMSNAP_TRY(list_snapshots(store, where)).snapshots) {
      auto& packs = packs_of[store.index_name(entry.info.domain)];
      const ImageFile manifest = VMSNAP_TRY(store.open_manifest(entry.path));
      for (const layout::PackRow& row : VMSNAP_TRY(manifest.read_packs())) {
        if (row.referenced != 0) packs.insert(row.id);
      }
    }
  }
  const StoreLock lock = VMSNAP_TRY(StoreLock::index(store.paths()));
  for (const auto& [name, packs] : packs_of) {
    VMSNAP_CHECK(ContentIndex::remove(store.paths(), name));
    VMSNAP_TEST_POINT("repair.index_removed");
    for (const layout::ImageId& id : packs) {
      const auto file = PackFile::open(store.paths().pack(id), id, store.master());
      if (!file) continue;  // in quarantine, or gone
      const layout::PackTrailer trailer = VMSNAP_TRY((*file)->trailer());
      const auto frames = VMSNAP_TRY((*file)->frame_table(trailer));
      VMSNAP_CHECK(ContentIndex::add(store.paths(), name, id, frames));
      report.indexed_pages += frames.size();
      VMSNAP_CHECK(check_interrupted());
    }
  }
  report.done.push_back(fmt::format("made {} index(es) anew, of {} pages", packs_of.size(),
                                    report.indexed_pages));
  return {};
}

}  // namespace

Result<RepairReport> repair_store(const Store& store, std::chrono::milliseconds lock_wait,
                                  int64_t now_unix_ms) {
  const StoreLock lock = VMSNAP_TRY(StoreLock::maintain(store.paths(), lock_wait));
  RepairReport report;
  const StoreVerifyReport found =
      VMSNAP_TRY(verify_store(store, {.sample = 1, .now_unix_ms = now_unix_ms}));
  report.lost_pages = found.lost_pages;
  for (const layout::ImageId& id : found.bad_packs) {
    const std::string path = store.paths().pack(id);
    if (::access(path.c_str(), F_OK) != 0) continue;  // there already, or missing
    VMSNAP_CHECK(quarantine(store, path, id_text(id)));
    report.done.push_back(fmt::format("moved pack {} to quarantine", id_text(id)));
  }
  VMSNAP_CHECK(quarantine_manifests(store, report));
  VMSNAP_CHECK(rebuild_indexes(store, report));
  return report;
}

}  // namespace vmsnap
