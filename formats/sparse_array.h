// A large array of zeros of which the untouched parts cost no memory.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include "formats/error.h"

namespace vmsnap {

enum class Touched {
  in_parts,  // huge pages would make one entry cost 2 MiB
  all_over,  // they save a fault and a TLB miss for most entries
};

// T must be valid as all zero bits. Rounded up to whole 4096-byte pages, which
// are readable as zeros past size(). Not synchronised.
template <class T>
class SparseArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  static Result<SparseArray> create(uint64_t size, Touched touched = Touched::in_parts) {
    SparseArray array;
    if (size > std::numeric_limits<size_t>::max() / sizeof(T)) {
      return fail_errno(ENOMEM, "cannot reserve address space");
    }
    array.bytes_ = size * sizeof(T);
    if (array.bytes_ == 0) return array;
    void* memory = ::mmap(nullptr, array.bytes_, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      return fail_errno(errno, "cannot reserve {} bytes of address space", array.bytes_);
    }
    // Advice only.
    (void)::madvise(memory, array.bytes_,
                    touched == Touched::all_over ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    array.data_ = static_cast<T*>(memory);
    array.size_ = size;
    return array;
  }

  SparseArray() = default;
  SparseArray(SparseArray&& other) noexcept { *this = std::move(other); }
  SparseArray& operator=(SparseArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~SparseArray() {
    if (data_) ::munmap(data_, bytes_);
  }

  uint64_t size() const { return size_; }
  T& operator[](uint64_t index) { return data_[index]; }
  const T& operator[](uint64_t index) const { return data_[index]; }

 private:
  T* data_ = nullptr;
  uint64_t size_ = 0;
  size_t bytes_ = 0;
};

}  // namespace vmsnap
