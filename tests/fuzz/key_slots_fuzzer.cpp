// Any bytes as a store's key slots. What opens is the one key that the corpus
// has a slot for: nobody finds another by changing bytes. Only key files are
// tried, because a passphrase may cost 4 GiB.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string_view>

#include "formats/key_slots.h"

using namespace vmsnap;

namespace {

constexpr std::string_view key_file_content = "fuzzer";

const KeyMaterial& fixed_material() {
  static const KeyMaterial material = [] {
    KeyMaterial result{KeyKind::key_file, SecretBytes::create(key_file_content.size()).value()};
    std::memcpy(result.secret.bytes().data(), key_file_content.data(), key_file_content.size());
    return result;
  }();
  return material;
}

// The bytes 1, 2, ... 32.
bool is_master_of_corpus(const SecretKey& key) {
  std::array<uint8_t, SecretKey::size> expected;
  std::iota(expected.begin(), expected.end(), uint8_t{1});
  return std::ranges::equal(key.bytes(), expected);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto slots = nlohmann::json::parse(data, data + size, nullptr, /*allow_exceptions=*/false);
  const auto master = unlock(slots, fixed_material(), "store");
  if (master && !is_master_of_corpus(*master)) std::abort();
  if (!master && master.error().code() != ErrorCode::damaged &&
      master.error().code() != ErrorCode::wrong_key) {
    std::abort();
  }
  return 0;
}
