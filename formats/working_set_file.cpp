#include "formats/working_set_file.h"

#include <algorithm>
#include <cstring>

#include "formats/byte_source.h"
#include "formats/checked_block.h"
#include "formats/checksum.h"
#include "formats/file.h"

namespace vmsnap {

namespace {

using layout::WorkingSetHeader;

// It is no image, and 'verify' says nothing of it.
template <class... Args>
tl::unexpected<Error> unusable(const std::string& name, fmt::format_string<Args...> format,
                               Args&&... args) {
  return tl::unexpected(
      Error(ErrorCode::damaged, fmt::format("{} cannot be used: {}", name,
                                            fmt::format(format, std::forward<Args>(args)...)))
          .with_remedy("Remove it; it only says in which order pages are loaded."));
}

constexpr size_t largest =
    sizeof(WorkingSetHeader) + layout::working_set_max_pages * sizeof(uint64_t);

}  // namespace

std::vector<std::byte> encode_working_set(const layout::ImageId& image,
                                          std::span<const uint64_t> pages) {
  pages = pages.first(std::min<size_t>(pages.size(), layout::working_set_max_pages));
  const auto numbers = std::as_bytes(pages);
  WorkingSetHeader header = {};
  header.magic = layout::working_set_magic;
  header.version = layout::working_set_version;
  header.image = image;
  header.count = pages.size();
  header.pages_checksum = checksum(numbers, 0);
  header.checksum = block_checksum(header);
  std::vector<std::byte> bytes(sizeof header + numbers.size());
  std::memcpy(bytes.data(), &header, sizeof header);
  if (!pages.empty()) std::memcpy(bytes.data() + sizeof header, numbers.data(), numbers.size());
  return bytes;
}

Result<std::vector<uint64_t>> decode_working_set(std::span<const std::byte> bytes,
                                                 const layout::ImageId& image, uint64_t page_count,
                                                 const std::string& name) {
  WorkingSetHeader header;
  if (bytes.size() < sizeof header) return unusable(name, "it is cut short");
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header.magic != layout::working_set_magic) return unusable(name, "it is no working set");
  if (header.version != layout::working_set_version) {
    return fail(ErrorCode::unsupported, "{} has version {}; this program reads version {}", name,
                header.version, layout::working_set_version);
  }
  if (header.checksum != block_checksum(header)) {
    return unusable(name, "the checksum of its header is wrong");
  }
  if (header.reserved0 != 0 || !all_zero(header.reserved)) {
    return unusable(name, "its header is not what it must be");
  }
  if (header.image != image) return unusable(name, "it belongs to another image");
  const auto numbers = bytes.subspan(sizeof header);
  if (header.count > layout::working_set_max_pages ||
      numbers.size() != header.count * sizeof(uint64_t)) {
    return unusable(name, "its length is wrong");
  }
  if (header.pages_checksum != checksum(numbers, 0)) {
    return unusable(name, "the checksum of its pages is wrong");
  }
  std::vector<uint64_t> pages(header.count);
  if (!pages.empty()) std::memcpy(pages.data(), numbers.data(), numbers.size());
  std::vector<uint64_t> sorted = pages;
  std::ranges::sort(sorted);
  if (!sorted.empty() && sorted.back() >= page_count) {
    return unusable(name, "it names page {} of {}", sorted.back(), page_count);
  }
  if (std::ranges::adjacent_find(sorted) != sorted.end()) {
    return unusable(name, "it names a page twice");
  }
  return pages;
}

Result<std::vector<uint64_t>> read_working_set(const std::string& path,
                                               const layout::ImageId& image, uint64_t page_count) {
  const RegularFile file = VMSNAP_TRY(open_regular_file(path));
  if (file.size > largest) return unusable(path, "it has {} bytes", file.size);
  std::vector<std::byte> bytes(file.size);
  VMSNAP_CHECK(read_exact_at(file.fd.get(), bytes, 0, path));
  return decode_working_set(bytes, image, page_count, path);
}

Status write_working_set(const std::string& path, const layout::ImageId& image,
                         std::span<const uint64_t> pages) {
  const std::vector<std::byte> bytes = encode_working_set(image, pages);
  return write_small_file(path, {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
}

}  // namespace vmsnap
