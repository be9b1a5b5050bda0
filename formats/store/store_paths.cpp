#include "formats/store/store_paths.h"

#include <filesystem>
#include <system_error>
#include <utility>

#include "formats/image_file.h"
#include "formats/store/pack_file.h"

namespace vmsnap {

namespace fs = std::filesystem;

StorePaths::StorePaths(std::string directory) : root(std::move(directory)) {
  while (root.size() > 1 && root.ends_with('/')) root.pop_back();
}

std::string StorePaths::pack(const layout::ImageId& id) const { return packs() + "/" + id_text(id); }

namespace {

// What cannot be looked for is not taken for missing: without a permission or a
// descriptor that would be said of every pack.
Result<bool> is_there(const std::string& path) {
  std::error_code error;
  const bool there = fs::exists(path, error);
  if (error) return fail_errno(error.value(), "cannot look for {}", path);
  return there;
}

}  // namespace

Result<std::string> StorePaths::find_pack(const layout::ImageId& id) const {
  // A pack moves between these only by rename(2), and out of the first two
  // only when no manifest refers to it: looked at in a circle, it is found.
  const std::string quarantined = quarantine() + "/" + id_text(id);
  for (int round = 0; round < 2; ++round) {
    if (VMSNAP_TRY(is_there(pack(id)))) return pack(id);
    std::string condemned_pack = VMSNAP_TRY(find_condemned(id));
    if (!condemned_pack.empty()) return condemned_pack;
    if (VMSNAP_TRY(is_there(quarantined))) return quarantined;
  }
  return tl::unexpected(
      Error(ErrorCode::damaged, fmt::format("pack {} is not in the store {}", id_text(id), root))
          .with_remedy("'vmsnap verify --store " + root +
                       "' names the snapshots and pages that it takes with it."));
}

Result<std::string> StorePaths::find_condemned(const layout::ImageId& id) const {
  std::error_code error;
  const std::string suffix = "." + id_text(id);
  fs::directory_iterator entry(condemned(), error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    if (entry->path().filename().string().ends_with(suffix)) return entry->path().string();
  }
  if (error && error != std::errc::no_such_file_or_directory) {
    return fail_errno(error.value(), "cannot list {}", condemned());
  }
  return std::string();
}

std::string store_around(const std::string& manifest) {
  const fs::path path = fs::absolute(manifest);
  const fs::path folder = path.parent_path();
  layout::ImageId id;
  std::error_code error;
  const bool is_one = parse_id(path.filename().string(), id) &&
                      (folder.filename() == "snapshots" || folder.filename() == "trash") &&
                      fs::exists(folder.parent_path() / "store.json", error);
  return is_one ? folder.parent_path().string() : std::string();
}

}  // namespace vmsnap
