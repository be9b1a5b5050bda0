// Keys and bytes for the tests of what is encrypted.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "formats/secret_key.h"

namespace vmsnap {

// 0, 1, 2, ... plus `first`.
template <size_t Length>
std::array<uint8_t, Length> counting_bytes(uint8_t first = 0) {
  std::array<uint8_t, Length> bytes;
  for (size_t i = 0; i < Length; ++i) bytes[i] = static_cast<uint8_t>(first + i);
  return bytes;
}

inline SecretKey test_key(uint8_t first = 0) {
  return SecretKey::from_bytes(counting_bytes<SecretKey::size>(first)).value();
}

inline std::string hex(std::span<const uint8_t> bytes) {
  std::string text;
  for (const uint8_t byte : bytes) text += fmt::format("{:02x}", byte);
  return text;
}

inline std::string hex(std::span<const std::byte> bytes) {
  return hex(std::span(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()));
}

inline std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

}  // namespace vmsnap
