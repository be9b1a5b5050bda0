// Any bytes as the manifest of a snapshot in a store, whose packs are not
// there. Twice: as they are, and with all checksums made right.
#include <sys/mman.h>

#include <array>
#include <cstdlib>
#include <string>
#include <vector>

#include "formats/file.h"
#include "formats/store/manifest.h"
#include "formats/store/pack_set.h"
#include "formats/verify.h"
#include "tests/formats/image_forge.h"

namespace vmsnap {
namespace {

void try_manifest(std::span<const std::byte> bytes) {
  const Fd fd(::memfd_create("manifest", MFD_CLOEXEC));
  const std::string path = "/proc/self/fd/" + std::to_string(fd.get());
  if (!fd || !write_all(fd.get(), bytes, path)) std::abort();
  const auto manifest = ImageFile::open(path);
  if (!manifest) return;
  const auto info = manifest->read_info();
  const auto rows = manifest->read_packs();
  (void)manifest->read_working_set();
  if (!info || !rows) return;

  PackSet packs(StorePaths("/nowhere"), nullptr);
  packs.add_rows(*rows);
  std::array<std::byte, page_size> page;
  uint64_t entries = 0;
  const auto read = [&](uint64_t entry) -> Status {
    const Status status = read_stored_page(packs, entry, page);
    if (status) std::abort();
    return status;
  };
  // A tree may say that it has 2^41 pages with data.
  (void)visit_entries(*manifest, [&](uint64_t number, uint64_t entry) -> Status {
    if (entry == 0 || number >= manifest->trailer().page_count) std::abort();
    if (++entries > 200) return fail(ErrorCode::interrupted, "enough");
    (void)read(entry);
    return {};
  });
  if (manifest->trailer().page_count > 1 << 16) return;
  uint64_t asked = 0;
  const VerifyReport report = verify_manifest(*manifest, *info, [&](uint64_t) -> Status {
    ++asked;
    return {};
  });
  if (report.data_pages != asked || report.ok() != report.status().has_value()) std::abort();
  if (report.data_pages + report.zero_pages + report.damaged_pages != report.page_count) {
    std::abort();
  }
}

}  // namespace
}  // namespace vmsnap

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto input = std::as_bytes(std::span(data, size));
  vmsnap::try_manifest(input);
  std::vector<std::byte> mended(input.begin(), input.end());
  vmsnap::ImageForge(mended).mend(/*also_lengths=*/true);
  vmsnap::try_manifest(mended);
  return 0;
}
