#include "formats/seal.h"

#include <sodium.h>

#include <array>
#include <bit>
#include <cstring>

namespace vmsnap {

namespace {

static_assert(std::endian::native == std::endian::little, "the place is copied as it is");
static_assert(crypto_aead_chacha20poly1305_ietf_KEYBYTES == SecretKey::size);
static_assert(crypto_aead_chacha20poly1305_ietf_ABYTES == seal_tag_size);

using Nonce = std::array<unsigned char, crypto_aead_chacha20poly1305_ietf_NPUBBYTES>;

Nonce nonce_of(uint64_t place) {
  Nonce nonce = {};
  std::memcpy(nonce.data() + 4, &place, sizeof place);
  return nonce;
}

// libsodium wants pointers that are not null, also to nothing.
unsigned char* sodium_pointer(std::span<std::byte> bytes) {
  static unsigned char nothing[1];
  return bytes.empty() ? nothing : reinterpret_cast<unsigned char*>(bytes.data());
}

const unsigned char* sodium_pointer(std::span<const std::byte> bytes) {
  return reinterpret_cast<const unsigned char*>(bytes.data());
}

}  // namespace

void seal(const SecretKey& key, uint64_t place, std::span<const std::byte> associated,
          std::span<std::byte> in_out, std::span<std::byte, seal_tag_size> tag) {
  const Nonce nonce = nonce_of(place);
  unsigned char* const data = sodium_pointer(in_out);
  ::crypto_aead_chacha20poly1305_ietf_encrypt_detached(
      data, reinterpret_cast<unsigned char*>(tag.data()), nullptr, data, in_out.size(),
      sodium_pointer(associated), associated.size(), nullptr, nonce.data(), key.bytes().data());
}

bool unseal(const SecretKey& key, uint64_t place, std::span<const std::byte> associated,
            std::span<std::byte> in_out, std::span<const std::byte, seal_tag_size> tag) {
  const Nonce nonce = nonce_of(place);
  unsigned char* const data = sodium_pointer(in_out);
  return ::crypto_aead_chacha20poly1305_ietf_decrypt_detached(
             data, nullptr, data, in_out.size(), reinterpret_cast<const unsigned char*>(tag.data()),
             sodium_pointer(associated), associated.size(), nonce.data(), key.bytes().data()) == 0;
}

}  // namespace vmsnap
