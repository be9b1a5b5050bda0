#include "formats/export.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "formats/file.h"

namespace vmsnap {

namespace {

constexpr uint64_t max_run = 256;  // pages written at once

// Says which page it was in terms of regions, which is what the user knows.
Error in_region(const ImageReader& image, uint64_t page, Error error) {
  const Region* region = find_region(image.info().regions, page);
  if (!region) return error;
  return std::move(error).with_context(
      fmt::format("cannot read the page at offset {:#x} of region {}",
                  (page - region->first_page) * page_size, region->name));
}

Result<uint64_t> next_data_page(const ImageReader& image, uint64_t page) {
  return image.next_data_page(page).map_error(
      [&](Error error) { return in_region(image, page, std::move(error)); });
}

// Pages first..end, all decoded into `run`.
Status read_run(const ImageReader& image, uint64_t first, uint64_t end,
                std::vector<std::byte>& run) {
  run.resize((end - first) * page_size);
  for (uint64_t page = first; page < end; ++page) {
    const std::span<std::byte, page_size> out(run.data() + (page - first) * page_size, page_size);
    const auto kind = image.read_page(page, out);
    if (!kind) return tl::unexpected(in_region(image, page, kind.error()));
  }
  return {};
}

}  // namespace

Result<uint64_t> export_raw(const ImageReader& image, const std::string& out_path, bool replace) {
  AtomicFile file = VMSNAP_TRY(AtomicFile::create(out_path, replace));
  const uint64_t pages = image.page_count();
  if (::ftruncate(file.fd(), static_cast<off_t>(pages * page_size)) < 0) {
    return fail_errno(errno, "cannot make {} {} bytes long", out_path, pages * page_size);
  }
  std::vector<std::byte> run;
  uint64_t written = 0;
  uint64_t page = VMSNAP_TRY(next_data_page(image, 0));
  while (page < pages) {
    uint64_t end = page + 1;
    uint64_t next = VMSNAP_TRY(next_data_page(image, end));
    while (next == end && end - page < max_run && end < pages) {
      next = VMSNAP_TRY(next_data_page(image, ++end));
    }
    VMSNAP_CHECK(read_run(image, page, end, run));
    VMSNAP_CHECK(write_all_at(file.fd(), run, page * page_size, out_path));
    written += run.size();
    page = next;
  }
  VMSNAP_CHECK(file.commit());
  return written;
}

Status export_raw(const ImageReader& image, std::ostream& out) {
  std::vector<std::byte> run;
  for (uint64_t page = 0; page < image.page_count(); page += max_run) {
    const uint64_t end = std::min(page + max_run, image.page_count());
    VMSNAP_CHECK(read_run(image, page, end, run));
    out.write(reinterpret_cast<const char*>(run.data()), static_cast<std::streamsize>(run.size()));
    if (!out) return fail(ErrorCode::io, "cannot write to standard output");
  }
  out.flush();
  if (!out) return fail(ErrorCode::io, "cannot write to standard output");
  return {};
}

}  // namespace vmsnap
