#include "formats/store/store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <system_error>
#include <thread>

#include "formats/digest.h"
#include "formats/checksum.h"
#include "formats/damage.h"
#include "formats/image_tail.h"
#include "formats/interrupt.h"
#include "formats/key_slots.h"
#include "formats/sealed_file.h"
#include "formats/store/manifest.h"
#include "formats/store/pack_set.h"
#include "formats/store/store_config.h"

namespace vmsnap {

namespace fs = std::filesystem;

namespace {

// The packs of a snapshot that is open: with the lock on its manifest that
// says so.
class HeldPacks : public PackSet {
 public:
  HeldPacks(const Store& store, Fd held, std::shared_ptr<const Store> keep)
      : PackSet(store.paths(), store.master()), keep_(std::move(keep)), held_(std::move(held)) {}

 private:
  const std::shared_ptr<const Store> keep_;
  const Fd held_;
};

bool is_at(const Fd& fd, const std::string& path) {
  struct stat open_file, at_path;
  return ::fstat(fd.get(), &open_file) == 0 && ::stat(path.c_str(), &at_path) == 0 &&
         open_file.st_dev == at_path.st_dev && open_file.st_ino == at_path.st_ino;
}

struct HeldManifest {
  Fd fd;
  ImageFile file;
};

// None if it is just being replaced, deleted, or moved to the trash and back: to
// be tried again. The manifest that is locked must be the one that is read, and
// is one that prune leaves alone only while it has its name.
Result<std::optional<HeldManifest>> hold_manifest(const Store& store, const std::string& path) {
  const auto is_gone = [](const auto& opened) {
    return !opened && opened.error().os_errno() == ENOENT;
  };
  auto fd = open_file(path, O_RDONLY | O_NONBLOCK);
  if (is_gone(fd)) return std::nullopt;
  VMSNAP_CHECK(fd);
  // Prune has it for a moment, perhaps (claim_manifest).
  const bool locked = VMSNAP_TRY(lock_whole_file(fd->get(), path, FileLock::shared));
  if (!locked || !is_at(*fd, path)) return std::nullopt;
  auto manifest = store.open_manifest(path);
  if (is_gone(manifest)) return std::nullopt;
  return HeldManifest{std::move(*fd), VMSNAP_TRY(std::move(manifest))};
}

constexpr std::chrono::milliseconds hold_again{1};

Status make_directory(const std::string& path) {
  if (::mkdir(path.c_str(), 0700) == 0 || errno == EEXIST) return {};
  return fail_errno(errno, "cannot make the directory {}", path);
}

// What is there was written under a configuration that is lost: a new one, with
// another key, would not open it.
Status check_nothing_kept(const StorePaths& paths) {
  for (const std::string& directory : {paths.snapshots(), paths.trash(), paths.packs(),
                                       paths.condemned(), paths.quarantine()}) {
    std::error_code error;
    const fs::directory_iterator first(directory, error);
    if (error == std::errc::no_such_file_or_directory) continue;
    if (error) return fail_errno(error.value(), "cannot list {}", directory);
    if (first == fs::directory_iterator()) continue;
    return tl::unexpected(
        Error(ErrorCode::damaged,
              fmt::format("there is no {}, but something in {}", paths.config(), directory))
            .with_remedy("Put the saved store.json back into its place, or choose another "
                         "directory for a new store."));
  }
  return {};
}

// Where there is nothing, an empty directory, or what a killed creator left.
Status check_may_create(const StorePaths& paths) {
  VMSNAP_CHECK(check_nothing_kept(paths));
  std::error_code error;
  fs::directory_iterator entry(paths.root, error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    const bool ours = name.starts_with(".store.json.vmsnap-") || name == "lock" ||
                      name == "snapshots" || name == "trash" || name == "packs" ||
                      name == "condemned" || name == "quarantine" || name == "index" ||
                      name == "tmp";
    if (!ours) {
      return tl::unexpected(
          Error(ErrorCode::usage, fmt::format("{} is not a store, and not empty", paths.root))
              .with_remedy("Give the directory of a store, or one that is empty or not there."));
    }
  }
  return {};
}

Status create(const StorePaths& paths, const std::optional<KeyMaterial>& key) {
  const Status may_create = check_may_create(paths);
  // What is there may be of another who was first, just now.
  if (!may_create && VMSNAP_TRY(is_store(paths))) return {};
  VMSNAP_CHECK(may_create);
  VMSNAP_CHECK(make_directory(paths.root));
  for (const std::string& path :
       {paths.snapshots(), paths.trash(), paths.packs(), paths.condemned(), paths.quarantine(),
        paths.index(), paths.temporary()}) {
    VMSNAP_CHECK(make_directory(path));
  }
  VMSNAP_TRY(open_file(paths.lock(), O_RDWR | O_CREAT));
  const StoreConfig config = VMSNAP_TRY(make_store_config(key));
  VMSNAP_CHECK(sync_directory_of(paths.config()));
  VMSNAP_CHECK(sync_directory_of(paths.root));
  const Status written = write_store_config(paths, config, /*replace=*/false);
  if (!written && written.error().code() == ErrorCode::exists) return {};  // another was first
  return written;
}

// Else new snapshots would go in unsealed, beside the sealed ones: who can write
// to the store, but has no key, could have taken the keys out of its configuration.
// Whoever did that could have put a plain one beside them: `at_most` one of them
// tells it of a mishap only.
Status check_not_sealed(const StorePaths& paths, size_t at_most = SIZE_MAX) {
  for (const std::string& directory : {paths.snapshots(), paths.trash()}) {
    for (const std::string& id : VMSNAP_TRY(manifest_ids(directory))) {
      if (at_most-- == 0) return {};
      if (!looks_sealed(directory + "/" + id)) continue;
      return tl::unexpected(
          Error(ErrorCode::damaged,
                fmt::format("{} says that the store is not encrypted, but its snapshots are",
                            paths.config()))
              .with_remedy("Put the store.json from before in its place; without its keys nothing "
                           "opens the snapshots."));
    }
  }
  return {};
}

}  // namespace

Store::Store(StorePaths paths, StoreLock use, std::optional<SecretKey> master)
    : paths_(std::move(paths)), use_(std::move(use)), master_(std::move(master)) {
  if (master_) hash_key_ = master_->derive("hash", layout::ImageId{});
}

Result<std::unique_ptr<Store>> Store::open(const StoreOptions& options) {
  const StorePaths paths = {options.directory};
  VMSNAP_CHECK(check_is_store(paths));
  const StoreConfig config = VMSNAP_TRY(read_store_config(paths));
  return open(paths, VMSNAP_TRY(unlock_store(config, paths, options.key)));
}

Result<std::unique_ptr<Store>> Store::open(const StorePaths& paths, std::optional<SecretKey> master) {
  if (!master) VMSNAP_CHECK(check_not_sealed(paths, 1));  // no work that grows with the store
  StoreLock use = VMSNAP_TRY(StoreLock::use(paths));
  return std::unique_ptr<Store>(new Store(paths, std::move(use), std::move(master)));
}

Result<std::unique_ptr<Store>> Store::open_or_create(const StoreOptions& options) {
  const StorePaths paths = {options.directory};
  if (VMSNAP_TRY(is_store(paths))) {
    auto store = VMSNAP_TRY(open(options));
    if (!store->master_) VMSNAP_CHECK(check_not_sealed(paths));
    return store;
  }
  const std::optional<KeyMaterial> key = VMSNAP_TRY(read_key(options.key));
  VMSNAP_CHECK(create(paths, key));
  const StoreConfig config = VMSNAP_TRY(read_store_config(paths));
  return open(paths, VMSNAP_TRY(unlock_store(config, paths, key)));
}

Status Store::begin_again() {
  use_ = VMSNAP_TRY(StoreLock::use(paths_));
  return {};
}

uint64_t Store::page_hash(std::span<const std::byte> page) const {
  return hash_key_ ? keyed_hash64(*hash_key_, page) : checksum(page, 0);
}

std::string Store::index_name(const std::string& domain) const {
  const auto bytes = std::as_bytes(std::span(domain));
  const uint64_t hash = hash_key_ ? keyed_hash64(*hash_key_, bytes) : checksum(bytes, 0);
  return fmt::format("{:016x}", hash);
}

Result<ImageFile> Store::open_manifest(const std::string& path) const {
  if (!master_) {
    return ImageFile::open(std::shared_ptr<const ByteSource>(VMSNAP_TRY(PlainSource::open(path))));
  }
  return ImageFile::open(
      std::shared_ptr<const ByteSource>(VMSNAP_TRY(SealedSource::open(path, *master_))));
}

Result<std::unique_ptr<ImageReader>> Store::open_snapshot(
    const std::string& id, std::shared_ptr<const Store> keep) const {
  // A VM may have been restored from it, and go on, when it was removed.
  const auto is_in_trash = [&] { return ::access(paths_.snapshot(id).c_str(), F_OK) != 0; };
  std::string path;
  std::optional<HeldManifest> held;
  for (;;) {
    path = is_in_trash() ? paths_.in_trash(id) : paths_.snapshot(id);
    held = VMSNAP_TRY(hold_manifest(*this, path));
    if (held) break;
    if (is_in_trash() && ::access(paths_.in_trash(id).c_str(), F_OK) != 0) {
      return fail_errno(ENOENT, "cannot open {}", path);
    }
    VMSNAP_CHECK(check_interrupted());
    std::this_thread::sleep_for(hold_again);
  }
  if (id_text(held->file.header().id) != id) {
    return damaged(path, "it is another snapshot than its name says");
  }
  auto packs = std::make_unique<HeldPacks>(*this, std::move(held->fd), std::move(keep));
  packs->add_rows(VMSNAP_TRY(held->file.read_packs()));
  return ImageReader::open(std::move(held->file), std::move(packs));
}

}  // namespace vmsnap
