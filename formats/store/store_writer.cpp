#include "formats/store/store_writer.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "formats/append_file.h"
#include "formats/log.h"
#include "formats/sealed_file.h"
#include "formats/store/manifest.h"
#include "formats/test_point.h"

namespace vmsnap {

namespace {

constexpr uint64_t min_pack_bytes = 64 << 20;
constexpr uint64_t max_target = 1 << 30;

// A snapshot has at most some 64 new packs (of 1 GiB, if it is very large), so
// that few of them have a part of any one region.
uint64_t pack_bytes_for(const std::vector<Region>& regions) {
  return std::clamp(total_pages(regions) * page_size / 64, min_pack_bytes, max_target);
}

// The newest snapshot of the same VM and domain that can be read.
ParentSnapshot find_parent(const Store& store, const StoreWriter::Options& options) {
  const auto list = list_snapshots(store, Where::snapshots);
  if (!list) return {};
  const auto newest = [&](const auto& is_before) -> ParentSnapshot {
    for (auto entry = list->snapshots.rbegin(); entry != list->snapshots.rend(); ++entry) {
      if (entry->info.domain != options.domain || !is_before(*entry)) continue;
      auto packs = [&]() -> Result<std::vector<layout::PackRow>> {
        return VMSNAP_TRY(store.open_manifest(entry->path)).read_packs();
      }();
      auto reader = store.open_snapshot(entry->id);
      if (packs && reader) return {std::move(*reader), std::move(*packs)};
    }
    return {};
  };
  if (!options.backup_name.empty()) {
    ParentSnapshot parent = newest([&](const SnapshotEntry& entry) {
      return backup_name(entry.info.tags) == options.backup_name;
    });
    if (parent.reader) return parent;
  }
  return newest([&](const SnapshotEntry& entry) { return entry.vm() == options.vm; });
}

}  // namespace

StoreWriter::StoreWriter(const Store& store, Options options)
    : store_(store), options_(std::move(options)), packs_(store.paths(), store.master()) {}

Result<std::unique_ptr<StoreWriter>> StoreWriter::begin(const Store& store,
                                                        const std::vector<Region>& regions,
                                                        Options options) {
  // What killed writers left goes when the next one comes.
  remove_abandoned(store.paths().temporary());
  if (!options.image.hash) {
    options.image.hash = [&store](std::span<const std::byte> page) { return store.page_hash(page); };
  }
  const uint64_t pack_bytes = options.pack_bytes ? options.pack_bytes : pack_bytes_for(regions);
  std::unique_ptr<StoreWriter> writer(new StoreWriter(store, std::move(options)));
  const Options& o = writer->options_;
  writer->sink_ = std::make_unique<PackSink>(store.paths(), writer->packs_, pack_bytes,
                                             o.image.deltas, store.master());
  writer->known_ = VMSNAP_TRY(KnownSnapshots::create(
      store, writer->packs_, find_parent(store, o),
      ContentIndex::open(store.paths(), store.index_name(o.domain)), regions));

  // The id is known only when the image is; the name comes with it.
  writer->file_ = VMSNAP_TRY(AtomicFile::create_in(
      store.paths().temporary(), store.paths().snapshot("manifest"), /*replace=*/false));
  const int fd = writer->file_->fd();
  if (store.master()) {
    writer->manifest_ =
        std::make_unique<SealedWriter>(fd, writer->file_->path(), *store.master());
  } else {
    writer->manifest_ = std::make_unique<AppendFile>(fd, writer->file_->path(), 0);
  }
  writer->image_ = VMSNAP_TRY(ImageWriter::create_manifest(
      *writer->manifest_, *writer->sink_, writer->known_.get(), "a snapshot in " + store.paths().root,
      total_pages(regions), o.image));
  writer->file_->rename_to(store.paths().snapshot(writer->image_->id()));
  return writer;
}

Result<StoreWriter::Committed> StoreWriter::commit(ImageInfo info,
                                                   std::span<const std::byte> device_state,
                                                   std::span<const uint64_t> working_set) {
  // First, because the manifest says how much they added.
  VMSNAP_TRY(sink_->close());
  info.domain = options_.domain;
  info.added_bytes = sink_->bytes();
  const uint64_t manifest_bytes = VMSNAP_TRY(image_->finish(info, device_state, working_set));
  VMSNAP_CHECK(file_->sync());
  VMSNAP_TEST_POINT("store.manifest_synced");
  {
    const StoreLock lock = VMSNAP_TRY(StoreLock::commit(store_.paths()));
    VMSNAP_CHECK(keep_old_packs());
    VMSNAP_CHECK(sink_->publish());
    VMSNAP_CHECK(sync_directory_of(store_.paths().packs() + "/."));
    VMSNAP_TEST_POINT("store.packs_renamed");
    VMSNAP_CHECK(file_->publish());
    VMSNAP_TEST_POINT("store.manifest_renamed");
    VMSNAP_CHECK(sync_directory_of(file_->path()));
  }
  add_to_index();
  VMSNAP_TEST_POINT("store.indexed");
  return Committed{.added_bytes = info.added_bytes + manifest_bytes};
}

// Prune may have taken a pack out of sight that nobody needed but us. It cannot
// have deleted it: we have been there all the time.
Status StoreWriter::keep_old_packs() const {
  bool renamed = false;
  for (uint64_t number = 1; number <= packs_.size(); ++number) {
    if (packs_.being_written(number)) continue;
    const layout::ImageId id = packs_.row(number).id;
    const std::string path = store_.paths().pack(id);
    if (::access(path.c_str(), F_OK) == 0) continue;
    const std::string condemned = VMSNAP_TRY(store_.paths().find_condemned(id));
    if (condemned.empty()) {
      // In quarantine since we looked at it, perhaps.
      VMSNAP_TRY(store_.paths().find_pack(id));
      continue;
    }
    if (::rename(condemned.c_str(), path.c_str()) < 0) {
      return fail_errno(errno, "cannot rename {} to {}", condemned, path);
    }
    renamed = true;
  }
  return renamed ? sync_directory_of(store_.paths().packs() + "/.") : Status();
}

// The snapshot is there already; without this, later ones find less of it.
void StoreWriter::add_to_index() const {
  const std::string name = store_.index_name(options_.domain);
  const auto added = [&]() -> Status {
    const StoreLock lock = VMSNAP_TRY(StoreLock::index(store_.paths()));
    for (const PackSink::Finished& pack : sink_->finished()) {
      VMSNAP_CHECK(ContentIndex::add(store_.paths(), name, pack.row.id, pack.frames));
    }
    return {};
  }();
  if (!added) log_warning("the index was not brought up to date: {}", added.error().message());
}

}  // namespace vmsnap
