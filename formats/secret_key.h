// Keys and passphrases in memory that is wiped and, where allowed, locked.
//
// The memory is libsodium's (sodium_malloc): between guard pages, never in a
// core file, kept out of swap as far as RLIMIT_MEMLOCK goes, overwritten
// before it is given back. It takes some pages each, so that a process may
// have thousands of secrets but not millions. Running out of memory throws
// std::bad_alloc, as any container does.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "formats/error.h"

namespace vmsnap {

// Whether libsodium can be used, on any thread. Whatever hands out a secret has
// asked, so that who holds one need not ask again.
Status crypto_ready();

// Secret bytes of any length, at least one. Move-only; a moved-from one is empty.
class SecretBytes {
 public:
  SecretBytes() = default;  // empty
  // Zeros, to be filled.
  static Result<SecretBytes> create(size_t size);

  std::span<std::byte> bytes() { return {data_.get(), size_}; }
  std::span<const std::byte> bytes() const { return {data_.get(), size_}; }
  size_t size() const { return size_; }
  // Forgets about what is behind `size`, which is wiped.
  void shrink(size_t size);

  SecretBytes(SecretBytes&& other) noexcept;
  SecretBytes& operator=(SecretBytes&& other) noexcept;

 private:
  struct Free {
    void operator()(std::byte* data) const;
  };

  std::unique_ptr<std::byte[], Free> data_;
  size_t size_ = 0;
};

// What a derived key is for: a literal of at most 8 characters. One purpose is
// one use; a key is never used by two algorithms.
class KeyPurpose {
 public:
  static constexpr size_t max_length = 8;

  template <size_t Length>
  consteval KeyPurpose(const char (&text)[Length]) {
    static_assert(Length - 1 <= max_length, "a purpose has at most 8 characters");
    for (size_t i = 0; i + 1 < Length; ++i) bytes_[i] = static_cast<uint8_t>(text[i]);
  }
  std::span<const uint8_t, max_length> bytes() const { return bytes_; }

 private:
  std::array<uint8_t, max_length> bytes_ = {};  // zeros behind the text
};

// A 256-bit key. Move-only; a moved-from one must not be used. Any number of
// threads may use one key.
class SecretKey {
 public:
  static constexpr size_t size = 32;

  static Result<SecretKey> random();
  static Result<SecretKey> from_bytes(std::span<const uint8_t, size> bytes);

  // The key of one file or one use: BLAKE2b of the purpose and the id, keyed
  // with this key. It tells nothing about this key or its other derived ones.
  SecretKey derive(KeyPurpose purpose, std::span<const uint8_t, 16> id) const;

  std::span<const uint8_t, size> bytes() const;

 private:
  explicit SecretKey(SecretBytes bytes) : bytes_(std::move(bytes)) {}

  SecretBytes bytes_;
};

// SipHash-2-4 of `bytes`, with the first half of `key`: a hash whose collisions
// cannot be made without the key. Derive a key for it alone.
uint64_t keyed_hash64(const SecretKey& key, std::span<const std::byte> bytes);

}  // namespace vmsnap
