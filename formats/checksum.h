// XXH3-64, the checksum of every structure in an image.
//
// It finds damage, not forgery: whoever can write the file can make it match.
#pragma once

#include <xxhash.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace vmsnap {

inline uint64_t checksum(std::span<const std::byte> bytes, uint64_t seed) {
  return XXH3_64bits_withSeed(bytes.data(), bytes.size(), seed);
}

// The same over bytes that come in pieces. For one thread at a time.
class StreamChecksum {
 public:
  StreamChecksum() : state_(XXH3_createState(), XXH3_freeState) {}

  void reset(uint64_t seed) { XXH3_64bits_reset_withSeed(state_.get(), seed); }
  void add(std::span<const std::byte> bytes) {
    XXH3_64bits_update(state_.get(), bytes.data(), bytes.size());
  }
  uint64_t value() const { return XXH3_64bits_digest(state_.get()); }

 private:
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state_;
};

}  // namespace vmsnap
