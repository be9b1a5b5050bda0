// What a page server must not forget when it is killed: for every page of the
// image, whether the guest was given it (resolved) and whether it gave it back
// (removed); and the events that were read and not yet acted upon.
//
// A removed page is zero from then on; image content would be the past. The
// kernel tells of a removal once, when the event is read. So events are read
// straight into event_buffer(), where a successor finds them: the kernel has
// written them before read(2) returns, and so before the reader can die.
//
// With a file behind it, all this lives in a shared mapping and survives
// SIGKILL. It does not survive a crash of the host, nor does the guest.
//
// Any number of threads may set and read marks. The buffer is for one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "formats/error.h"

namespace vmsnap {

class PageMarks {
 public:
  PageMarks() = default;  // of no page; no events may be read into it
  static Result<PageMarks> in_memory(uint64_t pages);
  // Makes or truncates the file, all marks unset, its space allocated.
  static Result<PageMarks> create(const std::string& path, uint64_t pages);
  // ErrorCode::damaged if the file is not one for so many pages.
  static Result<PageMarks> open(const std::string& path, uint64_t pages);

  PageMarks(PageMarks&& other) noexcept;
  PageMarks& operator=(PageMarks&& other) noexcept;
  ~PageMarks();

  // Room for the messages of one read(2) of a userfaultfd; zeros when all that
  // was read has been acted upon.
  std::span<std::byte> event_buffer() const;

  // So many bytes of it have been acted upon. Killed between any two stores, a
  // successor finds either the marks or the events.
  void forget_events(size_t bytes) const;

  uint64_t pages() const { return pages_; }
  bool resolved(uint64_t page) const { return test(0, page); }
  bool removed(uint64_t page) const { return test(1, page); }
  // Neither: the guest is still to get what the image has.
  bool wanted(uint64_t page) const { return !resolved(page) && !removed(page); }

  uint64_t count_resolved(uint64_t first, uint64_t count) const;

  // They return how many of the marks were not set before.
  uint64_t set_resolved(uint64_t first, uint64_t count) { return set(0, first, count); }
  uint64_t set_removed(uint64_t first, uint64_t count) { return set(1, first, count); }

 private:
  static constexpr uint64_t buffer_bytes = 2048;

  PageMarks(uint64_t* words, uint64_t pages) : words_(words), pages_(pages) {}
  static uint64_t words_per_kind(uint64_t pages) { return (pages + 63) / 64; }
  static uint64_t bytes_for(uint64_t pages) { return buffer_bytes + 2 * words_per_kind(pages) * 8; }
  static Result<PageMarks> map(int fd, const std::string& name, uint64_t pages);

  bool test(int kind, uint64_t page) const;
  uint64_t set(int kind, uint64_t first, uint64_t count);

  uint64_t* bits(int kind) const {
    return words_ + buffer_bytes / 8 + static_cast<uint64_t>(kind) * words_per_kind(pages_);
  }

  uint64_t* words_ = nullptr;  // the buffer, the resolved bits, the removed bits
  uint64_t pages_ = 0;
};

}  // namespace vmsnap
