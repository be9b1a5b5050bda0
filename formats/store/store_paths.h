// Where things are in a store's directory.
#pragma once

#include <string>

#include "formats/error.h"
#include "formats/image_layout.h"

namespace vmsnap {

struct StorePaths {
  StorePaths() = default;
  // Without slashes at its end: what syncs the directory around `root` takes all
  // up to the last one for it.
  StorePaths(std::string directory);

  std::string root;

  std::string config() const { return root + "/store.json"; }
  std::string lock() const { return root + "/lock"; }
  std::string snapshots() const { return root + "/snapshots"; }
  std::string trash() const { return root + "/trash"; }
  std::string packs() const { return root + "/packs"; }
  std::string condemned() const { return root + "/condemned"; }
  std::string quarantine() const { return root + "/quarantine"; }
  std::string index() const { return root + "/index"; }
  std::string temporary() const { return root + "/tmp"; }
  std::string working_sets() const { return root + "/working-sets"; }
  std::string verified() const { return root + "/verified.json"; }

  // `id`: 32 hexadecimal digits.
  std::string snapshot(const std::string& id) const { return snapshots() + "/" + id; }
  std::string in_trash(const std::string& id) const { return trash() + "/" + id; }
  std::string working_set(const std::string& id) const { return working_sets() + "/" + id; }
  std::string pack(const layout::ImageId& id) const;

  // Where the pack is now: under its name, waiting to be deleted, or in
  // quarantine. ErrorCode::damaged if it is nowhere; any other error says that
  // it could not be looked for.
  Result<std::string> find_pack(const layout::ImageId& id) const;
  // Its path among those that wait to be deleted (EPOCH.ID); empty if it is
  // not there.
  Result<std::string> find_condemned(const layout::ImageId& id) const;
};

// DIR of DIR/snapshots/ID, or of DIR/trash/ID if it was removed while somebody
// reads it, if DIR is a store; else empty.
std::string store_around(const std::string& manifest);

}  // namespace vmsnap
