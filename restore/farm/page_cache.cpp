#include "restore/farm/page_cache.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "formats/image_reader.h"

namespace vmsnap {

PageCache::PageCache(const SharedMemory& memory, uint64_t limit)
    : memory_(memory), limit_(limit), unshared_(memory.pages()) {
  if (limit_ > 0) was_dropped_.resize(memory.pages());
}

PageCache::~PageCache() {
  if (mapping_) ::munmap(mapping_, memory_.pages() * page_size);
}

Result<std::unique_ptr<PageCache>> PageCache::attach(const SharedMemory& memory, uint64_t limit) {
  std::unique_ptr<PageCache> cache(new PageCache(memory, limit));
  const uint64_t bytes = memory.pages() * page_size;
  void* at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory.fd(), 0);
  if (at == MAP_FAILED) return fail_errno(errno, "cannot map {} bytes of shared memory", bytes);
  cache->mapping_ = static_cast<std::byte*>(at);
  // Only for filling: no fault of the kernel's is to be caught, so that no
  // privilege is needed.
  Fd raw(static_cast<int>(
      ::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY)));
  if (!raw) return fail_errno(errno, "cannot make a userfaultfd");
  cache->uffd_ = VMSNAP_TRY(Uffd::initialize(std::move(raw), uffd_feature::missing_shmem));
  const RegisterOutcome outcome = VMSNAP_TRY(
      cache->uffd_.register_range({cache->address_of(0), bytes}, {.missing = true}));
  if (outcome != RegisterOutcome::done) {
    return fail(ErrorCode::unsupported, "this kernel cannot fill shared memory by userfaultfd");
  }
  if (limit > 0) {
    // A predecessor's, in the order of their numbers.
    for (const auto& [first, count] : cache->present()) cache->note_put(first, count);
  }
  return cache;
}

RemotePtr PageCache::address_of(uint64_t page) const {
  return RemotePtr(reinterpret_cast<uint64_t>(mapping_) + page * page_size);
}

std::vector<std::pair<uint64_t, uint64_t>> PageCache::present() const {
  std::vector<std::pair<uint64_t, uint64_t>> runs;
  off_t at = 0;
  // Page by page: SEEK_HOLE would look at all the rest of a full file.
  while ((at = ::lseek(memory_.fd(), at, SEEK_DATA)) >= 0) {
    const uint64_t page = static_cast<uint64_t>(at) / page_size;
    if (!runs.empty() && runs.back().first + runs.back().second == page) {
      ++runs.back().second;
    } else {
      runs.emplace_back(page, 1);
    }
    at += static_cast<off_t>(page_size);
  }
  return runs;
}

bool PageCache::contains(uint64_t page) const {
  const auto at = static_cast<off_t>(page * page_size);
  return ::lseek(memory_.fd(), at, SEEK_DATA) == at;
}

bool PageCache::is_shared(uint64_t page) const {
  std::lock_guard lock(mutex_);
  return !unshared_[page];
}

uint64_t PageCache::resident() const {
  struct stat about = {};
  if (::fstat(memory_.fd(), &about) < 0) return 0;
  return static_cast<uint64_t>(about.st_blocks) * 512 / page_size;
}

uint64_t PageCache::room() const {
  if (limit_ == 0) return ~uint64_t{0};
  const uint64_t there = resident();
  return limit_ - std::min(limit_, there);
}

Result<PageCache::Put> PageCache::put(uint64_t first_page, std::span<const std::byte> bytes) {
  std::lock_guard lock(mutex_);
  const uint64_t count = bytes.size() / page_size;
  if (unshared_[first_page]) return Put::not_shared;
  for (uint64_t i = 0; i < count;) {
    uint64_t run = 0;
    while (i + run < count && !unshared_[first_page + i + run]) ++run;
    if (run > 0) {
      const Put put = VMSNAP_TRY(put_run(first_page + i, bytes.subspan(i * page_size, run * page_size)));
      if (put != Put::done) return put;
    }
    i += run + 1;  // and over the one that is not shared
  }
  return Put::done;
}

Result<PageCache::Put> PageCache::put_run(uint64_t page, std::span<const std::byte> bytes) {
  VMSNAP_CHECK(make_room(bytes.size() / page_size));
  while (!bytes.empty()) {
    const Uffd::Copied copied = VMSNAP_TRY(uffd_.copy(address_of(page), bytes));
    uint64_t done = copied.bytes / page_size;
    note_put(page, done);
    if (done == 0) {
      if (copied.outcome == CopyOutcome::no_memory) return Put::no_memory;
      if (copied.outcome == CopyOutcome::no_mapping) {
        return fail(ErrorCode::io, "the mapping of the shared memory is gone");
      }
      if (copied.outcome == CopyOutcome::already_there) done = 1;
    }
    page += done;
    bytes = bytes.subspan(done * page_size);
  }
  return Put::done;
}

void PageCache::note_put(uint64_t first_page, uint64_t count) {
  if (limit_ == 0) return;
  for (uint64_t page = first_page; page < first_page + count; ++page) {
    (was_dropped_[page] ? kept_pages_ : new_pages_).push_back(page);
  }
}

// New pages go first, unless they have shrunk to a quarter of all.
Status PageCache::make_room(uint64_t pages) {
  if (limit_ == 0) return {};
  for (uint64_t there = resident(); there + pages > limit_ && there > 0;) {
    const bool from_new = !new_pages_.empty() && (kept_pages_.empty() || new_pages_.size() > limit_ / 4);
    std::deque<uint64_t>& queue = from_new ? new_pages_ : kept_pages_;
    if (queue.empty()) return {};
    const uint64_t page = queue.front();
    queue.pop_front();
    if (!contains(page)) continue;
    VMSNAP_CHECK(punch(page, 1));
    was_dropped_[page] = true;
    dropped_.fetch_add(1, std::memory_order_relaxed);
    --there;
  }
  return {};
}

Status PageCache::unshare(uint64_t first_page, uint64_t count) {
  std::lock_guard lock(mutex_);
  std::fill_n(unshared_.begin() + static_cast<std::ptrdiff_t>(first_page), count, true);
  return punch(first_page, count);
}

Status PageCache::punch(uint64_t first_page, uint64_t count) {
  if (::fallocate(memory_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>(first_page * page_size),
                  static_cast<off_t>(count * page_size)) == 0) {
    return {};
  }
  return fail_errno(errno, "cannot drop pages of the shared memory");
}

}  // namespace vmsnap
