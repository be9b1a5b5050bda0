#include "formats/image_info.h"

#include <algorithm>
#include <string_view>

namespace vmsnap {

std::string vm_name(const ImageInfo& info) {
  const auto name = info.source.find("name");
  return name != info.source.end() && name->is_string() ? name->get<std::string>() : std::string();
}

namespace {
constexpr std::string_view backup_prefix = "backup:";
}

std::string backup_tag(const std::string& name) { return std::string(backup_prefix) + name; }

bool is_backup_tag(const std::string& tag) { return tag.starts_with(backup_prefix); }

std::string backup_name(const std::vector<std::string>& tags) {
  for (auto tag = tags.rbegin(); tag != tags.rend(); ++tag) {
    if (is_backup_tag(*tag)) return tag->substr(backup_prefix.size());
  }
  return {};
}

uint64_t total_pages(const std::vector<Region>& regions) {
  uint64_t pages = 0;
  for (const Region& region : regions) pages += region.length / page_size;
  return pages;
}

const Region* find_region(const std::vector<Region>& regions, uint64_t page) {
  const auto after = std::ranges::upper_bound(regions, page, {}, &Region::first_page);
  if (after == regions.begin()) return nullptr;
  const Region& region = *(after - 1);
  return page - region.first_page < region.length / page_size ? &region : nullptr;
}

}  // namespace vmsnap
