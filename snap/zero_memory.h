// Zeros to copy from, in any number, which take no memory: all of it is the kernel's
// one page of zeros (mmap(2), MAP_PRIVATE and never written).
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <memory>
#include <span>

#include "formats/error.h"

namespace vmsnap {

class ZeroMemory {
 public:
  static Result<ZeroMemory> create(size_t bytes) {
    void* start = ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return fail_errno(errno, "cannot map {} bytes", bytes);
    // Not the huge page of zeros, which the kernel makes when it is first wanted.
    (void)::madvise(start, bytes, MADV_NOHUGEPAGE);
    return ZeroMemory(static_cast<std::byte*>(start), bytes);
  }

  std::span<const std::byte> bytes() const { return {start_.get(), start_.get_deleter().bytes}; }

 private:
  struct Unmap {
    size_t bytes = 0;
    void operator()(std::byte* start) const { ::munmap(start, bytes); }
  };
  ZeroMemory(std::byte* start, size_t bytes) : start_(start, Unmap{bytes}) {}

  std::unique_ptr<std::byte, Unmap> start_;
};

}  // namespace vmsnap
