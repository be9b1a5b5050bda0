// Any bytes as store.json.
#include <cstdlib>
#include <string>

#include "formats/store/pack_file.h"
#include "formats/store/store_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string json(reinterpret_cast<const char*>(data), size);
  const auto config = vmsnap::parse_store_config(json, "store.json");
  vmsnap::layout::ImageId id;
  if (config && !vmsnap::parse_id(config->id, id)) std::abort();
  if (!config && config.error().code() != vmsnap::ErrorCode::damaged &&
      config.error().code() != vmsnap::ErrorCode::unsupported) {
    std::abort();
  }
  return 0;
}
