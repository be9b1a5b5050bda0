#include "formats/store/manifest.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <system_error>

#include "formats/damage.h"
#include "formats/file.h"
#include "formats/log.h"
#include "formats/page_tree.h"
#include "formats/store/pack_file.h"

namespace vmsnap {

namespace fs = std::filesystem;

namespace {

const std::string& directory_of(const Store& store, Where where, std::string& buffer) {
  buffer = where == Where::trash ? store.paths().trash() : store.paths().snapshots();
  return buffer;
}

Result<SnapshotEntry> read_entry(const Store& store, const std::string& path, Where where) {
  const ImageFile manifest = VMSNAP_TRY(store.open_manifest(path));
  SnapshotEntry entry;
  entry.path = path;
  entry.info = VMSNAP_TRY(manifest.read_info());
  entry.id = entry.info.id;
  entry.page_count = manifest.trailer().page_count;
  entry.zero_pages = manifest.trailer().zero_pages;
  entry.manifest_bytes = manifest.trailer().file_length;
  entry.in_trash = where == Where::trash;
  struct stat status;
  if (entry.in_trash && ::stat(path.c_str(), &status) == 0) {
    // rename(2) sets the time of the last change.
    entry.removed_unix_ms = status.st_ctim.tv_sec * 1000 + status.st_ctim.tv_nsec / 1'000'000;
  }
  return entry;
}

}  // namespace

Result<std::vector<std::string>> manifest_ids(const std::string& directory) {
  std::vector<std::string> ids;
  std::error_code error;
  fs::directory_iterator entry(directory, error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    layout::ImageId id;
    const std::string name = entry->path().filename().string();
    if (parse_id(name, id)) ids.push_back(name);
  }
  if (error) return fail_errno(error.value(), "cannot list {}", directory);
  return ids;
}

Result<SnapshotList> list_snapshots(const Store& store, Where where) {
  std::string directory;
  SnapshotList list;
  for (const std::string& id : VMSNAP_TRY(manifest_ids(directory_of(store, where, directory)))) {
    auto entry = read_entry(store, directory + "/" + id, where);
    if (entry) {
      list.snapshots.push_back(std::move(*entry));
    } else if (entry.error().os_errno() != ENOENT) {
      // One that lies on a bad sector is no reason not to have the others.
      if (!says_damage(entry.error())) return tl::unexpected(entry.error());
      list.unreadable.push_back(entry.error());
    }
  }
  std::ranges::sort(list.snapshots, {}, [](const SnapshotEntry& e) {
    return std::pair(e.info.created_unix_ms, e.id);
  });
  return list;
}

Result<std::string> resolve_snapshot(const Store& store, Where where, const std::string& text,
                                     const std::string& vm) {
  std::string directory;
  const auto none = [&](std::string what) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("{} in the store {}", what, store.paths().root))
            .with_remedy("'vmsnap list --store " + store.paths().root + "' shows what there is."));
  };
  if (text == "latest") {
    SnapshotList list = VMSNAP_TRY(list_snapshots(store, where));
    for (auto entry = list.snapshots.rbegin(); entry != list.snapshots.rend(); ++entry) {
      if (!vm.empty() && !entry->is_of(vm)) continue;
      for (const Error& error : list.unreadable) {
        log_warning("there may be a later snapshot: {}", error.message());
      }
      return entry->id;
    }
    // The newest may be the one that cannot be read.
    if (!list.unreadable.empty()) return tl::unexpected(list.unreadable.front());
    return none(vm.empty() ? "there is no snapshot" : "there is no snapshot of '" + vm + "'");
  }
  std::vector<std::string> found;
  for (const std::string& id : VMSNAP_TRY(manifest_ids(directory_of(store, where, directory)))) {
    if (id.starts_with(text)) found.push_back(id);
  }
  if (found.size() == 1) return found.front();
  if (found.empty() || text.empty()) return none("there is no snapshot '" + text + "'");
  return none(fmt::format("'{}' is the beginning of {} snapshots' ids", text, found.size()));
}

bool manifest_in_use(const std::string& path) {
  const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  // Where nobody can be asked, somebody may be there.
  return fd && (::fcntl(fd.get(), F_OFD_GETLK, &lock) < 0 || lock.l_type != F_UNLCK);
}

Fd claim_manifest(const std::string& path) {
  Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  const bool locked = fd && lock_whole_file(fd.get(), path).value_or(false);
  return locked ? std::move(fd) : Fd();
}

Status visit_entries(const ImageFile& manifest, const VisitEntry& visit) {
  const PageTree tree(manifest.source(), manifest.tree_shape());
  const uint64_t count = manifest.trailer().page_count;
  for (uint64_t page = 0;; ++page) {
    page = VMSNAP_TRY(tree.next_data_page(page));
    if (page >= count) return {};
    VMSNAP_CHECK(visit(page, VMSNAP_TRY(tree.entry(page))));
  }
}

}  // namespace vmsnap
