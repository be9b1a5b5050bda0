#include "snap/vmm/pagemap.h"

#include <fcntl.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "formats/image_info.h"

namespace vmsnap {

namespace {

// PAGEMAP_SCAN, include/uapi/linux/fs.h of Linux 6.7; newer than Debian 12's
// kernel header.
struct PageRegion {
  uint64_t start;
  uint64_t end;
  uint64_t categories;
};
struct ScanArgument {
  uint64_t size;
  uint64_t flags;
  uint64_t start;
  uint64_t end;
  uint64_t walk_end;
  uint64_t regions;
  uint64_t regions_count;
  uint64_t max_pages;
  uint64_t category_inverted;
  uint64_t category_mask;
  uint64_t category_anyof_mask;
  uint64_t return_mask;
};
constexpr unsigned long pagemap_scan = _IOWR('f', 16, ScanArgument);
constexpr uint64_t category_written = 1 << 1;  // carries no write-protect mark
constexpr uint64_t category_present = 1 << 3;
constexpr uint64_t category_swapped = 1 << 4;
constexpr uint64_t category_huge = 1 << 6;

// Bits of an entry of /proc/PID/pagemap.
constexpr uint64_t entry_marked = uint64_t{1} << 57;
constexpr uint64_t entry_of_file = uint64_t{1} << 61;
constexpr uint64_t entry_swapped = uint64_t{1} << 62;
constexpr uint64_t entry_present = uint64_t{1} << 63;

// Of what is swapped out, the entry has the swap area's number. The kernel keeps the
// last one for markers, which stand for no page (include/linux/swap.h).
constexpr uint64_t swap_area_bits = 31;
constexpr uint64_t marker_area = 31;

bool is_owned(uint64_t entry) {
  if (entry & entry_of_file) return false;
  if (entry & entry_present) return true;
  return (entry & entry_swapped) && (entry & swap_area_bits) != marker_area;
}

void append(std::vector<RemoteRange>& runs, RemotePtr start, uint64_t length) {
  if (!runs.empty() && runs.back().end() == start) {
    runs.back().length += length;
  } else {
    runs.push_back({start, length});
  }
}

}  // namespace

Result<PageMap> PageMap::open(const Process& process, Method method) {
  PageMap map;
  map.fd_ = VMSNAP_TRY(open_file(fmt::format("/proc/{}/pagemap", process.pid()), O_RDONLY));
  if (method == Method::automatic) {
    ScanArgument probe = {};
    probe.size = sizeof probe;
    map.use_ioctl_ = ::ioctl(map.fd_.get(), pagemap_scan, &probe) == 0;
  }
  return map;
}

Result<std::vector<RemoteRange>> PageMap::populated(RemoteRange range) const {
  return scan(range, Want::populated);
}

Result<std::vector<RemoteRange>> PageMap::marked(RemoteRange range) const {
  return scan(range, Want::marked);
}

Result<std::vector<RemoteRange>> PageMap::unmarked(RemoteRange range) const {
  return scan(range, Want::unmarked);
}

Result<std::vector<RemoteRange>> PageMap::owned(RemoteRange range) const {
  return scan_by_read(range, Want::owned);
}

Result<std::vector<RemoteRange>> PageMap::huge(RemoteRange range) const {
  if (!use_ioctl_) return std::vector<RemoteRange>();
  return scan_by_ioctl(range, Want::huge);
}

Result<std::vector<RemoteRange>> PageMap::scan(RemoteRange range, Want want) const {
  return use_ioctl_ ? scan_by_ioctl(range, want) : scan_by_read(range, want);
}

Result<std::vector<RemoteRange>> PageMap::scan_by_ioctl(RemoteRange range, Want want) const {
  std::vector<RemoteRange> runs;
  std::array<PageRegion, 512> found;
  uint64_t start = range.start.address();
  const uint64_t end = range.end().address();
  while (start < end) {
    ScanArgument request = {};
    request.size = sizeof request;
    request.start = start;
    request.end = end;
    request.regions = reinterpret_cast<uint64_t>(found.data());
    // The kernel allocates for all of them: of a single page that is a quarter of its time.
    request.regions_count = std::min<uint64_t>(found.size(), (end - start) / page_size);
    request.category_anyof_mask = category_present | category_swapped;
    if (want == Want::marked || want == Want::unmarked) request.category_mask = category_written;
    if (want == Want::marked) request.category_inverted = category_written;
    if (want == Want::huge) request.category_mask = category_huge;
    // Asking for one category that all matches share makes the kernel merge
    // neighbours into runs.
    request.return_mask = want == Want::huge ? category_huge : category_written;
    const int count = ::ioctl(fd_.get(), pagemap_scan, &request);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return fail_errno(errno, "PAGEMAP_SCAN failed at {:#x}", start);
    for (int i = 0; i < count; ++i) {
      append(runs, RemotePtr(found[i].start), found[i].end - found[i].start);
    }
    if (request.walk_end <= start) break;
    start = request.walk_end;
  }
  return runs;
}

Result<std::vector<RemoteRange>> PageMap::scan_by_read(RemoteRange range, Want want) const {
  std::vector<RemoteRange> runs;
  std::array<uint64_t, 8192> entries;
  const auto wanted = [want](uint64_t entry) {
    if (want == Want::owned) return is_owned(entry);
    const bool marked = entry & entry_marked;
    const bool there = entry & (entry_present | entry_swapped);
    return want == Want::marked ? marked : there && !(want == Want::unmarked && marked);
  };
  for (uint64_t offset = 0; offset < range.length;) {
    const RemotePtr at = range.start + offset;
    const size_t count = std::min<uint64_t>(entries.size(), (range.length - offset) / 4096);
    VMSNAP_CHECK(read_exact_at(fd_.get(), std::as_writable_bytes(std::span(entries.data(), count)),
                               at.address() / 4096 * sizeof(uint64_t), "pagemap"));
    for (size_t i = 0; i < count; ++i) {
      if (wanted(entries[i])) append(runs, at + i * 4096, 4096);
    }
    offset += count * 4096;
  }
  return runs;
}

}  // namespace vmsnap
