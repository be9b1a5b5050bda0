#include "formats/store/store_paths.h"

#include <filesystem>
#include <system_error>

#include "formats/image_file.h"

namespace vmsnap {

namespace fs = std::filesystem;

std::string StorePaths::pack(const layout::ImageId& id) const { return packs() + "/" + id_text(id); }

Result<std::string> StorePaths::find_pack(const layout::ImageId& id) const {
  // A pack moves between these only by rename(2), and out of the first two
  // only when no manifest refers to it: looked at in a circle, it is found.
  std::error_code error;
  for (int round = 0; round < 2; ++round) {
    if (fs::exists(pack(id), error)) return pack(id);
    const std::string condemned_pack = find_condemned(id);
    if (!condemned_pack.empty()) return condemned_pack;
    const std::string quarantined = quarantine() + "/" + id_text(id);
    if (fs::exists(quarantined, error)) return quarantined;
  }
  return tl::unexpected(
      Error(ErrorCode::damaged, fmt::format("pack {} is not in the store {}", id_text(id), root))
          .with_remedy("'vmsnap verify --store " + root +
                       "' names the snapshots and pages that it takes with it."));
}

std::string StorePaths::find_condemned(const layout::ImageId& id) const {
  std::error_code error;
  const std::string suffix = "." + id_text(id);
  fs::directory_iterator entry(condemned(), error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    if (entry->path().filename().string().ends_with(suffix)) return entry->path().string();
  }
  return {};
}

}  // namespace vmsnap
