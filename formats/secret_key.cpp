#include "formats/secret_key.h"

#include <sodium.h>

#include <cstring>
#include <new>
#include <utility>

namespace vmsnap {

Status crypto_ready() {
  static const bool ready = ::sodium_init() >= 0;
  if (ready) return {};
  return fail(ErrorCode::unsupported, "libsodium cannot be initialised");
}

void SecretBytes::Free::operator()(std::byte* data) const { ::sodium_free(data); }

Result<SecretBytes> SecretBytes::create(size_t size) {
  VMSNAP_CHECK(crypto_ready());
  SecretBytes secret;
  secret.data_.reset(static_cast<std::byte*>(::sodium_malloc(size)));
  if (!secret.data_) throw std::bad_alloc();
  secret.size_ = size;
  ::sodium_memzero(secret.data_.get(), size);  // sodium_malloc fills with a pattern
  return secret;
}

SecretBytes::SecretBytes(SecretBytes&& other) noexcept
    : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}

SecretBytes& SecretBytes::operator=(SecretBytes&& other) noexcept {
  data_ = std::move(other.data_);
  size_ = std::exchange(other.size_, 0);
  return *this;
}

void SecretBytes::shrink(size_t size) {
  if (size >= size_) return;
  ::sodium_memzero(data_.get() + size, size_ - size);
  size_ = size;
}

Result<SecretKey> SecretKey::random() {
  SecretKey key(VMSNAP_TRY(SecretBytes::create(size)));
  ::randombytes_buf(key.bytes_.bytes().data(), size);
  return key;
}

Result<SecretKey> SecretKey::from_bytes(std::span<const uint8_t, size> bytes) {
  SecretKey key(VMSNAP_TRY(SecretBytes::create(size)));
  std::memcpy(key.bytes_.bytes().data(), bytes.data(), size);
  return key;
}

SecretKey SecretKey::derive(KeyPurpose purpose, std::span<const uint8_t, 16> id) const {
  std::array<uint8_t, KeyPurpose::max_length + 16> input;
  std::memcpy(input.data(), purpose.bytes().data(), KeyPurpose::max_length);
  std::memcpy(input.data() + KeyPurpose::max_length, id.data(), id.size());
  SecretKey key(SecretBytes::create(size).value());  // libsodium was ready for this key
  ::crypto_generichash(reinterpret_cast<unsigned char*>(key.bytes_.bytes().data()), size,
                       input.data(), input.size(), bytes().data(), size);
  return key;
}

std::span<const uint8_t, SecretKey::size> SecretKey::bytes() const {
  return std::span<const uint8_t, size>(reinterpret_cast<const uint8_t*>(bytes_.bytes().data()),
                                        size);
}

uint64_t keyed_hash64(const SecretKey& key, std::span<const std::byte> bytes) {
  static_assert(crypto_shorthash_KEYBYTES <= SecretKey::size);
  uint64_t hash;
  static_assert(crypto_shorthash_BYTES == sizeof hash);
  ::crypto_shorthash(reinterpret_cast<unsigned char*>(&hash),
                     reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
                     key.bytes().data());
  return hash;
}

}  // namespace vmsnap
