// Authenticated encryption of one piece of a file, at its place: ChaCha20-
// Poly1305 (RFC 8439), the nonce being four zero bytes and the place as a
// little-endian number.
//
// A key and a place are used together once, or both pieces can be read by
// anybody who has them. So every file has a key of its own, derived from its
// random id, and no place in it is ever written a second time with other bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "formats/secret_key.h"

namespace vmsnap {

inline constexpr size_t seal_tag_size = 16;

// Encrypts `in_out` where it is; the tag is to be kept with it. `associated` is
// not encrypted, but unseal() must be given the same. Any thread, no allocation.
void seal(const SecretKey& key, uint64_t place, std::span<const std::byte> associated,
          std::span<std::byte> in_out, std::span<std::byte, seal_tag_size> tag);

// Decrypts `in_out` where it is. False, and `in_out` all zero, if anything is
// not as seal() left it: the key, the place, the bytes or the tag.
[[nodiscard]] bool unseal(const SecretKey& key, uint64_t place,
                          std::span<const std::byte> associated, std::span<std::byte> in_out,
                          std::span<const std::byte, seal_tag_size> tag);

}  // namespace vmsnap
