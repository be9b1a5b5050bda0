// An address in another process. A type of its own, so that it is never
// dereferenced here nor mixed up with an address of ours.
#pragma once

#include <compare>
#include <cstdint>

namespace vmsnap {

class RemotePtr {
 public:
  constexpr RemotePtr() = default;
  constexpr explicit RemotePtr(uint64_t address) : address_(address) {}

  constexpr uint64_t address() const { return address_; }
  constexpr RemotePtr operator+(uint64_t bytes) const { return RemotePtr(address_ + bytes); }
  constexpr uint64_t operator-(RemotePtr other) const { return address_ - other.address_; }
  constexpr auto operator<=>(const RemotePtr&) const = default;

 private:
  uint64_t address_ = 0;
};

// [start, start + length) in another process, page aligned.
struct RemoteRange {
  RemotePtr start;
  uint64_t length = 0;  // bytes

  constexpr RemotePtr end() const { return start + length; }
};

}  // namespace vmsnap
