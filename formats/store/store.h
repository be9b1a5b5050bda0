// A store: a directory with immutable packs of page frames, and one manifest
// for each snapshot (vmsnap-store(5)).
//
// The rename of a manifest is the only commit. Every snapshot is complete in
// itself: it names its packs, and needs no other snapshot.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/image_file.h"
#include "formats/image_reader.h"
#include "formats/key_source.h"
#include "formats/secret_key.h"
#include "formats/store/store_lock.h"
#include "formats/store/store_paths.h"

namespace vmsnap {

struct StoreOptions {
  std::string directory;
  KeySource key;
};

// An open store keeps the lock of a user until it is destroyed: packs that it
// may need are not deleted. All const members: any number of threads.
class Store {
 public:
  // ErrorCode::usage if there is no store; wrong_key if it is sealed and the
  // key is missing or wrong; unsupported for a newer version.
  static Result<std::unique_ptr<Store>> open(const StoreOptions& options);
  // The same, but makes one where there is nothing, or an empty directory:
  // mode 0700, sealed if a key was given. ErrorCode::damaged where snapshots or
  // packs are, but no configuration that opens them.
  static Result<std::unique_ptr<Store>> open_or_create(const StoreOptions& options);

  const StorePaths& paths() const { return paths_; }
  // Null for a store that is not sealed.
  const SecretKey* master() const { return master_ ? &*master_ : nullptr; }
  // Lets go of what was there before, as if the store were opened anew. Not
  // while anything is open in it.
  Status begin_again();

  // The hash by which equal pages are looked for; keyed in a sealed store, so
  // that the index tells nothing of the pages.
  uint64_t page_hash(std::span<const std::byte> page) const;
  // The name of a domain's index.
  std::string index_name(const std::string& domain) const;

  // A manifest at any path in the store.
  Result<ImageFile> open_manifest(const std::string& path) const;
  // The snapshot with this id, pages and all. While the reader lives, prune
  // leaves its manifest alone. It borrows the store, or shares `keep`.
  Result<std::unique_ptr<ImageReader>> open_snapshot(
      const std::string& id, std::shared_ptr<const Store> keep = nullptr) const;

 private:
  static Result<std::unique_ptr<Store>> open(const StorePaths& paths, std::optional<SecretKey> master);
  Store(StorePaths paths, StoreLock use, std::optional<SecretKey> master);

  const StorePaths paths_;
  StoreLock use_;
  const std::optional<SecretKey> master_;
  std::optional<SecretKey> hash_key_;
};

}  // namespace vmsnap
