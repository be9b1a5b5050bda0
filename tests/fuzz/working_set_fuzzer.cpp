// Any bytes as a recorded working set: as they are, and with the checksums made
// right, or nothing behind them would be reached.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>

#include "formats/checked_block.h"
#include "formats/working_set_file.h"

namespace vmsnap {
namespace {

constexpr layout::ImageId image = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
constexpr uint64_t image_pages = 1000;

void try_working_set(std::span<const std::byte> bytes) {
  const auto pages = decode_working_set(bytes, image, image_pages, "it");
  if (!pages) {
    const ErrorCode code = pages.error().code();
    if (code != ErrorCode::damaged && code != ErrorCode::unsupported) std::abort();
    return;
  }
  if (std::set<uint64_t>(pages->begin(), pages->end()).size() != pages->size()) std::abort();
  if (std::ranges::any_of(*pages, [](uint64_t page) { return page >= image_pages; })) std::abort();
  // What can be read is what would have been written.
  if (!std::ranges::equal(encode_working_set(image, *pages), bytes)) std::abort();
}

void mend(std::span<std::byte> bytes) {
  layout::WorkingSetHeader header;
  if (bytes.size() < sizeof header) return;
  std::memcpy(&header, bytes.data(), sizeof header);
  header.magic = layout::working_set_magic;
  header.version = layout::working_set_version;
  header.image = image;
  header.pages_checksum = checksum(bytes.subspan(sizeof header), 0);
  header.checksum = block_checksum(header);
  std::memcpy(bytes.data(), &header, sizeof header);
}

}  // namespace
}  // namespace vmsnap

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto input = std::as_bytes(std::span(data, size));
  vmsnap::try_working_set(input);
  std::vector<std::byte> mended(input.begin(), input.end());
  vmsnap::mend(mended);
  vmsnap::try_working_set(mended);
  return 0;
}
