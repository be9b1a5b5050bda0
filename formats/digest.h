// BLAKE2b-256 (RFC 7693), what content is recognised by: two contents with the
// same digest are the same content, also if somebody tries to make them differ.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace vmsnap {

using Digest = std::array<uint8_t, 32>;

// Any thread.
Digest digest(std::span<const std::byte> bytes);

// The same over bytes that come in pieces. For one thread at a time.
class DigestStream {
 public:
  DigestStream();
  ~DigestStream();
  DigestStream(const DigestStream&) = delete;
  DigestStream& operator=(const DigestStream&) = delete;

  void add(std::span<const std::byte> bytes);
  // Of all that was added. Ends this stream: nothing can be added afterwards.
  Digest finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vmsnap
