#include "restore/page_marks.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <utility>

#include "formats/file.h"

namespace vmsnap {

Result<PageMarks> PageMarks::map(int fd, const std::string& name, uint64_t pages) {
  const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  void* words = ::mmap(nullptr, bytes_for(pages), PROT_READ | PROT_WRITE, flags, fd, 0);
  if (words == MAP_FAILED) return fail_errno(errno, "cannot map {}", name);
  return PageMarks(static_cast<uint64_t*>(words), pages);
}

Result<PageMarks> PageMarks::in_memory(uint64_t pages) { return map(-1, "the page marks", pages); }

Result<PageMarks> PageMarks::create(const std::string& path, uint64_t pages) {
  const Fd fd = VMSNAP_TRY(open_file(path, O_RDWR | O_CREAT | O_TRUNC | O_NOFOLLOW));
  // A hole that the disk has no room for would be a SIGBUS later.
  const int failed = ::posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes_for(pages)));
  if (failed != 0) return fail_errno(failed, "cannot make {}", path);
  return map(fd.get(), path, pages);
}

Result<PageMarks> PageMarks::open(const std::string& path, uint64_t pages) {
  const Fd fd = VMSNAP_TRY(open_file(path, O_RDWR | O_NOFOLLOW));
  struct stat about = {};
  if (::fstat(fd.get(), &about) < 0) return fail_errno(errno, "cannot look at {}", path);
  if (static_cast<uint64_t>(about.st_size) != bytes_for(pages)) {
    return fail(ErrorCode::damaged, "{} has {} bytes, not the {} for {} pages", path, about.st_size,
                bytes_for(pages), pages);
  }
  return map(fd.get(), path, pages);
}

PageMarks::PageMarks(PageMarks&& other) noexcept
    : words_(std::exchange(other.words_, nullptr)), pages_(std::exchange(other.pages_, 0)) {}

PageMarks& PageMarks::operator=(PageMarks&& other) noexcept {
  std::swap(words_, other.words_);
  std::swap(pages_, other.pages_);
  return *this;
}

PageMarks::~PageMarks() {
  if (words_) ::munmap(words_, bytes_for(pages_));
}

std::span<std::byte> PageMarks::event_buffer() const {
  return {reinterpret_cast<std::byte*>(words_), buffer_bytes};
}

void PageMarks::forget_events(size_t bytes) const {
  std::atomic_signal_fence(std::memory_order_seq_cst);
  const auto done = event_buffer().first(bytes);
  std::fill(done.begin(), done.end(), std::byte{0});
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

bool PageMarks::test(int kind, uint64_t page) const {
  return std::atomic_ref(bits(kind)[page / 64]).load(std::memory_order_relaxed) >> (page % 64) & 1;
}

uint64_t PageMarks::count_resolved(uint64_t first, uint64_t count) const {
  uint64_t found = 0;
  const uint64_t end = std::min(first + count, pages_);
  for (uint64_t page = first; page < end; ++page) {
    if (page % 64 == 0 && page + 64 <= end) {
      found += static_cast<uint64_t>(
          std::popcount(std::atomic_ref(bits(0)[page / 64]).load(std::memory_order_relaxed)));
      page += 63;
    } else if (resolved(page)) {
      ++found;
    }
  }
  return found;
}

uint64_t PageMarks::set(int kind, uint64_t first, uint64_t count) {
  uint64_t* words = bits(kind);
  uint64_t newly = 0;
  const uint64_t end = std::min(first + count, pages_);
  for (uint64_t page = first; page < end;) {
    const uint64_t in_word = std::min<uint64_t>(64 - page % 64, end - page);
    const uint64_t ones = in_word == 64 ? ~uint64_t{0} : (uint64_t{1} << in_word) - 1;
    const uint64_t wanted = ones << (page % 64);
    const uint64_t before =
        std::atomic_ref(words[page / 64]).fetch_or(wanted, std::memory_order_relaxed);
    newly += static_cast<uint64_t>(std::popcount(wanted & ~before));
    page += in_word;
  }
  return newly;
}

}  // namespace vmsnap
