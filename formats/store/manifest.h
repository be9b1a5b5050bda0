// Manifests: which snapshots a store has, and what each of them needs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/image_info.h"
#include "formats/store/store.h"

namespace vmsnap {

struct SnapshotEntry {
  std::string id;
  std::string path;  // of its manifest
  bool in_trash = false;
  int64_t removed_unix_ms = 0;  // when it came into the trash
  ImageInfo info;
  uint64_t page_count = 0;
  uint64_t zero_pages = 0;
  uint64_t manifest_bytes = 0;

  std::string vm() const { return vm_name(info); }
  // Those of one group are kept and removed together, and follow each other:
  // what a backup calls the VM, or its own name.
  std::string group() const {
    const std::string name = backup_name(info.tags);
    return name.empty() ? vm() : name;
  }
  bool is_of(const std::string& name) const { return name == vm() || name == group(); }
};

struct SnapshotList {
  std::vector<SnapshotEntry> snapshots;  // the oldest first
  std::vector<Error> unreadable;         // manifests that are there, but damaged
};

enum class Where { snapshots, trash };

// Reads every manifest's header, trailer and metadata. What vanishes meanwhile
// is left out. Blocks on the disk.
Result<SnapshotList> list_snapshots(const Store& store, Where where);

// The full id of a snapshot that a user names: by its id, the beginning of it
// that no other snapshot has, or "latest" (of `vm`, as is_of() has it, if that is
// not empty).
// ErrorCode::usage if there is none, or more than one.
Result<std::string> resolve_snapshot(const Store& store, Where where, const std::string& text,
                                     const std::string& vm = {});

// Ids (names of manifests), in no order.
Result<std::vector<std::string>> manifest_ids(const std::string& directory);

// Whether somebody has the snapshot open: a VM that is restored from it. Takes
// no lock, so that nobody who opens it meanwhile is in the way, or is put off.
bool manifest_in_use(const std::string& path);

// For who replaces a manifest or deletes it: as long as the descriptor lives,
// Store::open_snapshot() waits, and then looks again at what is there. None if
// somebody has it open, or it is gone.
Fd claim_manifest(const std::string& path);

// Every page entry of a manifest that is not 0, in page order.
using VisitEntry = std::function<Status(uint64_t page, uint64_t entry)>;
Status visit_entries(const ImageFile& manifest, const VisitEntry& visit);

}  // namespace vmsnap
