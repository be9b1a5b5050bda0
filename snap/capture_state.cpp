#include "snap/capture_state.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

namespace vmsnap {

size_t CapturedPiece::window_index(uint64_t unit) const {
  return (piece.range.start + unit * page_size).address() / huge_page_bytes -
         piece.range.start.address() / huge_page_bytes;
}

CapturedPiece::Window CapturedPiece::window(uint64_t unit) const {
  const uint64_t into = (piece.range.start + unit * page_size).address() % huge_page_bytes / page_size;
  return {unit - std::min(unit, into), std::min(states.count(), unit + huge_page_bytes / page_size - into)};
}

bool CapturedPiece::is_whole(uint64_t unit) const {
  if (!is_huge(unit)) return false;
  const Window all = window(unit);
  for (uint64_t i = all.first; i < all.end; ++i) {
    if (states.get(i) != UnitState::armed) return false;
  }
  return true;
}

void CapturedPiece::note_huge(uint64_t first_unit, uint64_t count) {
  if (huge_.empty()) huge_.resize(window_index(states.count() - 1) + 1);
  for (uint64_t unit = first_unit; unit < first_unit + count; unit += huge_page_bytes / page_size) {
    huge_[window_index(unit)] = true;
  }
}

CaptureState::CaptureState(const Process& target, PageMap map, Uffd fd, const GuestMemory& memory,
                           std::unique_ptr<Staging> staging_memory)
    : process(target), pagemap(std::move(map)), uffd(std::move(fd)), staging(std::move(staging_memory)),
      file_name_("the file behind memory of " + target.describe()) {
  for (const MemoryPiece& piece : memory.pieces) {
    pieces.push_back(std::make_unique<CapturedPiece>(piece));
    if (piece.private_of_file()) pieces.back()->own.resize(piece.unit_count());
  }
}

CapturedPiece* CaptureState::find(RemotePtr address) const {
  for (const auto& piece : pieces) {
    if (address >= piece->piece.range.start && address < piece->piece.range.end()) return piece.get();
  }
  return nullptr;
}

void CaptureState::note_split(RemotePtr huge_page) {
  std::lock_guard lock(split_mutex_);
  split_.insert(huge_page);
}

std::set<RemotePtr> CaptureState::split_huge_pages() const {
  std::lock_guard lock(split_mutex_);
  return split_;
}

void CaptureState::fail(Error error) {
  {
    std::lock_guard lock(error_mutex_);
    if (!error_) error_ = std::move(error);
  }
  failed_.store(true, std::memory_order_release);
  staging->abort();
}

Status CaptureState::status() const {
  std::lock_guard lock(error_mutex_);
  if (error_) return tl::unexpected(*error_);
  return {};
}

Status CaptureState::copy(const CapturedPiece& piece, uint64_t first_unit, uint64_t offset,
                          std::span<std::byte> to) const {
  if (piece.piece.private_of_file()) return copy_private_of_file(piece, first_unit, offset, to);
  const uint64_t in_piece = first_unit * piece.piece.unit_bytes + offset;
  return piece.piece.shared() ? read_file(piece, in_piece, to) : read_memory(piece, in_piece, to);
}

Status CaptureState::read_memory(const CapturedPiece& piece, uint64_t in_piece,
                                 std::span<std::byte> to) const {
  const Status read = process.read(piece.piece.range.start + in_piece, to);
  // Unmapped, moved, or its protection changed.
  if (!read && read.error().os_errno() == EFAULT) {
    return tl::unexpected(discarded(piece.piece.range.start + in_piece));
  }
  return read;
}

// Not through the mapping: reading a hole through that would fill it, and, if it is
// shared, would wait for ourselves.
Status CaptureState::read_file(const CapturedPiece& piece, uint64_t in_piece,
                               std::span<std::byte> to) const {
  if (!piece.piece.file) {
    std::ranges::fill(to, std::byte{0});
    return {};
  }
  return read_exact_at(piece.piece.file->get(), to, piece.piece.file_offset + in_piece, file_name_);
}

// A unit that is the process's own is read from it, all others from the file.
Status CaptureState::copy_private_of_file(const CapturedPiece& piece, uint64_t first_unit,
                                          uint64_t offset, std::span<std::byte> to) const {
  const uint64_t unit_bytes = piece.piece.unit_bytes;
  const uint64_t units = (offset + to.size() + unit_bytes - 1) / unit_bytes;
  const std::vector<bool> own = VMSNAP_TRY(owned_as_before(piece, first_unit, units));
  for (size_t done = 0; done < to.size();) {
    const uint64_t unit = (offset + done) / unit_bytes;
    uint64_t end = unit + 1;
    while (end < units && own[end] == own[unit]) ++end;
    const auto part = to.subspan(done, std::min(to.size() - done, end * unit_bytes - (offset + done)));
    const uint64_t in_piece = first_unit * unit_bytes + offset + done;
    VMSNAP_CHECK(own[unit] ? read_memory(piece, in_piece, part) : read_file(piece, in_piece, part));
    done += part.size();
  }
  return {};
}

Result<std::vector<bool>> CaptureState::owned(const CapturedPiece& piece, uint64_t first_unit,
                                              uint64_t count) const {
  std::vector<bool> own(count);
  const std::vector<RemoteRange> runs = VMSNAP_TRY(pagemap.owned(piece.units(first_unit, count)));
  for (const RemoteRange& run : runs) {
    const auto [first, end] = piece.touched_by(run);
    for (uint64_t unit = first; unit < end; ++unit) own[unit - first_unit] = true;
  }
  return own;
}

// Which units are the process's own: all that were at the instant, or it fails. One
// that was discarded leaves its mark, on nothing, and the file shines through.
Result<std::vector<bool>> CaptureState::owned_as_before(const CapturedPiece& piece, uint64_t first_unit,
                                                        uint64_t count) const {
  constexpr int tries = 10;  // a huge page that is being migrated cannot be seen
  for (int i = 1;; ++i) {
    std::vector<bool> own = VMSNAP_TRY(owned(piece, first_unit, count));
    uint64_t unit = 0;
    while (unit < count && (own[unit] || !piece.own[first_unit + unit])) ++unit;
    if (unit == count) return own;
    if (piece.piece.unit_bytes == page_size || i == tries) {
      return tl::unexpected(discarded(piece.units(first_unit + unit, 1).start));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

Error CaptureState::discarded(RemotePtr at) const {
  return Error(ErrorCode::discarded,
               fmt::format("memory of {} at {:#x} was discarded before it was copied",
                           process.describe(), at.address()))
      .with_remedy("Memory was given back (balloon, free page reporting), unmapped or merged while "
                   "the snapshot ran, so the snapshot was given up. The VM is unharmed: try again, "
                   "or keep the balloon still meanwhile.");
}

namespace {

bool all_zero(std::span<const std::byte> bytes) {
  return bytes.empty() ||
         (bytes[0] == std::byte{0} && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
}

}  // namespace

Status CaptureState::check(const CapturedPiece& piece, uint64_t first_unit, uint64_t count,
                           std::span<const std::byte> data) const {
  const RemoteRange range = piece.units(first_unit, count);
  const auto marked = VMSNAP_TRY(pagemap.marked(range));
  if (marked.size() != 1 || marked[0].start != range.start || marked[0].length != range.length) {
    const bool from_start = !marked.empty() && marked[0].start == range.start;
    return tl::unexpected(discarded(from_start ? marked[0].end() : range.start));
  }
  if (piece.piece.private_of_file()) VMSNAP_TRY(owned_as_before(piece, first_unit, count));
  if (piece.piece.file) return check_file(piece, first_unit, data);
  return {};
}

// A hole punched into a file leaves the marks of its pages (measured on Linux
// 6.18): zeros are believed only if the file still has the page.
Status CaptureState::check_file(const CapturedPiece& piece, uint64_t first_unit,
                                std::span<const std::byte> data) const {
  const int fd = piece.piece.file->get();
  if (piece.piece.unit_bytes > page_size) {
    struct stat about = {};
    if (::fstat(fd, &about) < 0) return fail_errno(errno, "cannot look at shared memory");
    if (static_cast<uint64_t>(about.st_blocks) < piece.expected_blocks) {
      return tl::unexpected(discarded(piece.units(first_unit, 1).start));
    }
    return {};
  }
  const uint64_t file_offset = piece.piece.file_offset + first_unit * page_size;
  for (size_t at = 0; at < data.size(); at += page_size) {
    const uint64_t unit = first_unit + at / page_size;
    if (!piece.own.empty() && piece.own[unit]) continue;
    if (!all_zero(data.subspan(at, page_size))) continue;
    // Not SEEK_HOLE, which would look through all that follows.
    const auto offset = static_cast<off_t>(file_offset + at);
    if (::lseek(fd, offset, SEEK_DATA) != offset) {
      return tl::unexpected(discarded(piece.units(unit, 1).start));
    }
  }
  return {};
}

Status CaptureState::release(CapturedPiece& piece, uint64_t first_unit, uint64_t count) {
  const RemoteRange range = piece.units(first_unit, count);
  for (;;) {
    const ProtectOutcome outcome = VMSNAP_TRY(uffd.unprotect(range));
    if (outcome == ProtectOutcome::no_mapping) return tl::unexpected(discarded(range.start));
    if (outcome == ProtectOutcome::done) break;
    if (failed()) return status();
  }
  return {};
}

}  // namespace vmsnap
