// The pages of an image in the memory that clones share: put there once each,
// whole, and taken out again where room is needed.
//
// Pages are put by UFFDIO_COPY into a mapping of our own, so that no clone ever
// sees a page half filled; that mapping is never touched otherwise. What is in
// the file, the file says itself (lseek(2), SEEK_DATA): there is no second
// record that could be wrong after a crash.
//
// A page that one clone gave back (its balloon) leaves the cache for good: in a
// private mapping a discarded page would come back as the file's, and it must
// come back as zero. From then on each clone gets its own copy of it.
//
// With a limit, the pages in the file never take more than that: cold ones are
// dropped, by fallocate(2), which takes them out of the clones' page tables
// but for the copies they wrote. Pages that were dropped once and came back are
// kept longer than those that are new (2Q: Johnson and Shasha, VLDB 1994).
//
// Any thread may call anything here. Sources: ioctl_userfaultfd(2),
// fallocate(2), and mm/shmem.c of Linux for private mappings of shared memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "formats/error.h"
#include "restore/farm/shared_memory.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

class PageCache {
 public:
  // `memory` must outlive this. `limit` in pages; 0: none. ErrorCode::privilege
  // when no userfaultfd can be had.
  static Result<std::unique_ptr<PageCache>> attach(const SharedMemory& memory, uint64_t limit);
  ~PageCache();
  PageCache(const PageCache&) = delete;
  PageCache& operator=(const PageCache&) = delete;

  bool contains(uint64_t page) const;
  bool is_shared(uint64_t page) const;

  enum class Put {
    done,        // all pages are there, whoever put them
    not_shared,  // the first page left the cache for good
    no_memory,   // the host has none at the moment
  };
  // Whole pages. Of several, those that are not shared are left out. Drops cold
  // pages first where the limit asks for it.
  Result<Put> put(uint64_t first_page, std::span<const std::byte> bytes);

  // Pages that are in the file now, as runs of first page and count; half a
  // microsecond a page.
  std::vector<std::pair<uint64_t, uint64_t>> present() const;

  // Takes pages out for good.
  Status unshare(uint64_t first_page, uint64_t count);

  // Pages that could be put before a cold one must be dropped.
  uint64_t room() const;
  uint64_t resident() const;  // pages in the file; swapped out ones count
  uint64_t limit() const { return limit_; }
  uint64_t dropped() const { return dropped_.load(std::memory_order_relaxed); }

 private:
  PageCache(const SharedMemory& memory, uint64_t limit);
  RemotePtr address_of(uint64_t page) const;
  Result<Put> put_run(uint64_t page, std::span<const std::byte> bytes);
  void note_put(uint64_t first_page, uint64_t count);
  Status make_room(uint64_t pages);
  Status punch(uint64_t first_page, uint64_t count);

  const SharedMemory& memory_;
  const uint64_t limit_;
  Uffd uffd_;
  std::byte* mapping_ = nullptr;  // never read nor written
  std::atomic<uint64_t> dropped_ = 0;

  // Putting and taking out exclude one another.
  mutable std::mutex mutex_;
  std::vector<bool> unshared_;  // by page
  // In the order in which they came; only with a limit. Pages that were taken
  // out since are skipped.
  std::deque<uint64_t> new_pages_, kept_pages_;
  std::vector<bool> was_dropped_;
};

}  // namespace vmsnap
