// Any bytes as an image: everything is read and verified. Twice: as they are,
// and with all checksums made right, or nothing behind them would be reached.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>
#include <vector>

#include "formats/file.h"
#include "formats/image_reader.h"
#include "formats/verify.h"
#include "tests/formats/image_forge.h"

namespace vmsnap {
namespace {

void read_everything(const ImageReader& image) {
  std::array<std::byte, page_size> bytes;
  uint64_t page = 0;
  // A tree may say that it has 2^41 pages with data.
  for (int reads = 0; reads < 600; ++reads) {
    const auto next = image.next_data_page(page);
    if (next && *next >= image.page_count()) break;
    if (next && *next < page) std::abort();
    const uint64_t candidate = next.value_or(page);
    if (candidate >= image.page_count()) break;
    const auto kind = image.read_page(candidate, bytes);
    if (next && kind && *kind != PageKind::data) std::abort();
    page = candidate + 1;
  }
  (void)image.device_state();
}

void try_image(std::span<const std::byte> bytes) {
  const Fd fd(::memfd_create("image", MFD_CLOEXEC));
  const std::string path = "/proc/self/fd/" + std::to_string(fd.get());
  if (!fd || !write_all(fd.get(), bytes, path)) std::abort();
  const auto image = ImageReader::open(path);
  if (!image) return;
  read_everything(**image);
  // Verify visits every page that the tree names.
  if ((*image)->page_count() <= 1 << 20) {
    const auto report = verify_image(path);
    if (!report || report->ok() != report->status().has_value()) std::abort();
    const uint64_t seen = report->data_pages + report->zero_pages + report->damaged_pages;
    if (seen != report->page_count) std::abort();
  }
}

}  // namespace
}  // namespace vmsnap

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto input = std::as_bytes(std::span(data, size));
  vmsnap::try_image(input);
  std::vector<std::byte> mended(input.begin(), input.end());
  vmsnap::ImageForge(mended).mend(/*also_lengths=*/true);
  vmsnap::try_image(mended);
  return 0;
}
