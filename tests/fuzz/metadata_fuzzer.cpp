// Any bytes as a metadata document; what is accepted can be written again.
#include <cstdlib>

#include "formats/metadata.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  const uint64_t page_count = data[0];
  const auto json = std::as_bytes(std::span(data + 1, size - 1));
  const auto info = vmsnap::decode_metadata(json, page_count, "image");
  if (!info) return 0;
  if (vmsnap::total_pages(info->regions) != page_count) std::abort();
  const auto again = vmsnap::encode_metadata(*info, page_count, "image");
  // Only a document that grows past a limit by being written differently.
  if (!again && size < 1 << 20) std::abort();
  return 0;
}
