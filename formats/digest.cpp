#include "formats/digest.h"

#include <sodium.h>

#include "formats/secret_key.h"

namespace vmsnap {

namespace {

// BLAKE2b works without sodium_init(), only slower: a failure is no matter.
void prefer_fast_code() { (void)crypto_ready(); }

}  // namespace

Digest digest(std::span<const std::byte> bytes) {
  prefer_fast_code();
  Digest result;
  ::crypto_generichash(result.data(), result.size(),
                       reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), nullptr,
                       0);
  return result;
}

struct DigestStream::State {
  crypto_generichash_state blake2b;
};

DigestStream::DigestStream() : state_(std::make_unique<State>()) {
  prefer_fast_code();
  ::crypto_generichash_init(&state_->blake2b, nullptr, 0, Digest().size());
}

DigestStream::~DigestStream() = default;

void DigestStream::add(std::span<const std::byte> bytes) {
  ::crypto_generichash_update(&state_->blake2b,
                              reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
}

Digest DigestStream::finish() {
  Digest result;
  ::crypto_generichash_final(&state_->blake2b, result.data(), result.size());
  return result;
}

}  // namespace vmsnap
