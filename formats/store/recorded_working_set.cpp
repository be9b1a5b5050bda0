#include "formats/store/recorded_working_set.h"

#include <sys/stat.h>

#include <cerrno>
#include <filesystem>

#include "formats/log.h"
#include "formats/store/pack_file.h"
#include "formats/store/store_paths.h"
#include "formats/working_set_file.h"

namespace vmsnap {

namespace {

namespace fs = std::filesystem;

Result<layout::ImageId> image_id_of(const ImageReader& image) {
  layout::ImageId id;
  if (parse_id(image.info().id, id)) return id;
  return fail(ErrorCode::damaged, "{} has no id", image.path());
}

}  // namespace

std::string working_set_path(const ImageReader& image) {
  const fs::path path = fs::absolute(image.path());
  const std::string store = store_around(path.string());
  if (store.empty()) return path.string() + ".working-set";
  return StorePaths{store}.working_set(path.filename().string());
}

Result<std::vector<uint64_t>> best_working_set(const ImageReader& image) {
  const layout::ImageId id = VMSNAP_TRY(image_id_of(image));
  auto recorded = read_working_set(working_set_path(image), id, image.page_count());
  if (recorded) return recorded;
  if (recorded.error().os_errno() != ENOENT) log_warning("{}", recorded.error().message());
  return image.working_set();
}

Status save_working_set(const ImageReader& image, std::span<const uint64_t> pages) {
  const layout::ImageId id = VMSNAP_TRY(image_id_of(image));
  const std::string path = working_set_path(image);
  // A store that an earlier version made has no place for them.
  const std::string folder = fs::path(path).parent_path().string();
  if (::mkdir(folder.c_str(), 0700) < 0 && errno != EEXIST) {
    return fail_errno(errno, "cannot make directory {}", folder);
  }
  return write_working_set(path, id, pages);
}

}  // namespace vmsnap
