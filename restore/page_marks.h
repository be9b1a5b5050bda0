// Two bits for every page of an image that outlive the page server: whether
// the guest was given the page (resolved), and whether it gave it back since
// (removed).
//
// A removed page is zero from then on; image content would be the past. The
// kernel tells of a removal once, when the event is read. If the server is
// killed between that read and its mark, the successor still sees it: a page
// that is resolved and yet not there was removed. (Pages are marked resolved
// after the copy, and before any further event is read.)
//
// Marks in a file live in its shared mapping: they survive SIGKILL, not a
// crash of the host, which the guest does not survive either.
//
// One thread sets marks; any thread may read them at the same time.
#pragma once

#include <cstdint>
#include <string>

#include "formats/error.h"

namespace vmsnap {

class PageMarks {
 public:
  static Result<PageMarks> in_memory(uint64_t pages);
  // Makes or truncates the file, all marks unset, its space allocated.
  static Result<PageMarks> create(const std::string& path, uint64_t pages);
  // ErrorCode::damaged if the file is not one for so many pages.
  static Result<PageMarks> open(const std::string& path, uint64_t pages);

  PageMarks(PageMarks&& other) noexcept;
  PageMarks& operator=(PageMarks&& other) noexcept;
  ~PageMarks();

  uint64_t pages() const { return pages_; }
  bool resolved(uint64_t page) const { return test(0, page); }
  bool removed(uint64_t page) const { return test(1, page); }
  // Neither: the guest is still to get what the image has.
  bool wanted(uint64_t page) const { return !resolved(page) && !removed(page); }

  uint64_t count_resolved(uint64_t first, uint64_t count) const;

  void set_resolved(uint64_t first, uint64_t count) { set(0, first, count); }
  void set_removed(uint64_t first, uint64_t count) { set(1, first, count); }

 private:
  PageMarks(uint64_t* words, uint64_t pages) : words_(words), pages_(pages) {}
  static uint64_t words_per_kind(uint64_t pages) { return (pages + 63) / 64; }
  static uint64_t bytes_for(uint64_t pages) { return 2 * words_per_kind(pages) * 8; }
  static Result<PageMarks> map(int fd, const std::string& name, uint64_t pages);

  bool test(int kind, uint64_t page) const;
  void set(int kind, uint64_t first, uint64_t count);

  uint64_t* words_ = nullptr;  // the resolved bits, then the removed ones
  uint64_t pages_ = 0;
};

}  // namespace vmsnap
