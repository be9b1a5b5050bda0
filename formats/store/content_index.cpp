#include "formats/store/content_index.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>


namespace vmsnap {

namespace {

constexpr layout::Magic index_magic = {'\x89', 'V', 'M', 'I', 'D', 'X', '1', '\n'};
constexpr size_t ways = 8;
constexpr uint64_t min_sets = 4096;                  // 512 KiB
constexpr uint64_t max_sets = uint64_t{1} << 36;     // 8 TiB
constexpr uint64_t window_sets = 8192;               // 1 MiB
constexpr uint64_t max_packs = uint64_t{1} << 24;    // what a hint has bits for

// `where`: pack ordinal 24, offset / 8 of the frame 40; 0 is a free place (no
// frame is at offset 0).
struct Slot {
  uint64_t hash;
  uint64_t where;
};
using Set = std::array<Slot, ways>;  // the newest first
static_assert(sizeof(Set) == 128);

struct Header {
  layout::Magic magic;
  uint64_t set_count;  // a power of two
  uint64_t added;      // hints in all, also those that were overwritten since
};

constexpr uint64_t sets_begin = layout::block_size;

// Hashes of a set are alike in their low bits; a set moves up when these grow.
uint64_t set_of(uint64_t hash, uint64_t set_count) { return hash & (set_count - 1); }

void insert(Set& set, Slot slot) {
  auto place = std::ranges::find(set, slot.where, &Slot::where);
  if (place == set.end()) place = set.end() - 1;
  std::move_backward(set.begin(), place, place + 1);
  set.front() = slot;
}

// So that a set of eight is three quarters full on average.
uint64_t sets_for(uint64_t hints) {
  return std::min(max_sets, std::bit_ceil(std::max(min_sets, hints / (ways * 3 / 4))));
}

std::string hints_path(const StorePaths& paths, const std::string& name) {
  return paths.index() + "/" + name + ".hints";
}
std::string packs_path(const StorePaths& paths, const std::string& name) {
  return paths.index() + "/" + name + ".packs";
}

// Whether the file is an index as add() makes it.
bool read_header(int fd, Header& header) {
  struct stat status;
  return ::fstat(fd, &status) == 0 &&
         ::pread(fd, &header, sizeof header, 0) == ssize_t{sizeof header} &&
         header.magic == index_magic && std::has_single_bit(header.set_count) &&
         header.set_count >= min_sets && header.set_count <= max_sets &&
         static_cast<uint64_t>(status.st_size) == sets_begin + header.set_count * sizeof(Set);
}

std::vector<layout::ImageId> read_packs(const std::string& path) {
  std::vector<layout::ImageId> packs;
  const auto bytes = read_small_file(path, max_packs * sizeof(layout::ImageId));
  if (!bytes) return packs;
  packs.resize(bytes->size() / sizeof(layout::ImageId));
  if (!packs.empty()) std::memcpy(packs.data(), bytes->data(), packs.size() * sizeof packs[0]);
  return packs;
}

// The sets of an old index, a window at a time, with the hints that still lead
// to a pack.
template <class Visit>
Status visit_live(int old, uint64_t old_sets, const std::vector<bool>& alive,
                  const std::string& name, const Visit& visit) {
  std::vector<Set> window;
  for (uint64_t first = 0; first < old_sets; first += window.size()) {
    window.resize(std::min(window_sets, old_sets - first));
    VMSNAP_CHECK(read_exact_at(old, std::as_writable_bytes(std::span(window)),
                               sets_begin + first * sizeof(Set), name));
    for (Set& set : window) {
      for (Slot& slot : set) {
        const uint64_t ordinal = slot.where >> 40;
        if (ordinal >= alive.size() || !alive[ordinal]) slot = {};
      }
    }
    VMSNAP_CHECK(visit(first, window));
  }
  return {};
}

// A file of header.set_count sets, no fewer than the old one's, with its hints.
Status make_index(const std::string& path, int old, uint64_t old_sets, const Header& header,
                  const std::vector<bool>& alive) {
  AtomicFile file = VMSNAP_TRY(AtomicFile::create(path, /*replace=*/true));
  const uint64_t bytes = sets_begin + header.set_count * sizeof(Set);
  if (::ftruncate(file.fd(), static_cast<off_t>(bytes)) < 0) {
    return fail_errno(errno, "cannot make {} of {} bytes", path, bytes);
  }
  VMSNAP_CHECK(write_all_at(file.fd(), std::as_bytes(std::span(&header, 1)), 0, path));
  // A set spreads over those with its number and more high bits.
  std::vector<Set> to;
  VMSNAP_CHECK(visit_live(old, old_sets, alive, path, [&](uint64_t first, std::span<Set> from) -> Status {
    for (uint64_t base = first; base < header.set_count; base += old_sets) {
      to.assign(from.size(), Set{});
      for (size_t i = 0; i < from.size(); ++i) {
        size_t used = 0;
        for (const Slot& slot : from[i]) {
          if (slot.where != 0 && set_of(slot.hash, header.set_count) == base + i) {
            to[i][used++] = slot;
          }
        }
      }
      VMSNAP_CHECK(write_all_at(file.fd(), std::as_bytes(std::span(to)),
                                sets_begin + base * sizeof(Set), path));
    }
    return {};
  }));
  return file.commit();
}

}  // namespace

ContentIndex ContentIndex::open(const StorePaths& paths, const std::string& name) {
  ContentIndex index;
  index.hints_ = Fd(::open(hints_path(paths, name).c_str(), O_RDONLY | O_CLOEXEC));
  Header header;
  if (!index.hints_ || !read_header(index.hints_.get(), header)) return ContentIndex();
  index.set_count_ = header.set_count;
  index.packs_ = read_packs(packs_path(paths, name));
  return index;
}

std::vector<ContentIndex::Hint> ContentIndex::find(uint64_t hash) const {
  std::vector<Hint> found;
  Set set;
  if (set_count_ == 0 || ::pread(hints_.get(), &set, sizeof set,
                                 static_cast<off_t>(sets_begin + set_of(hash, set_count_) *
                                                                     sizeof set)) != sizeof set) {
    return found;
  }
  for (const Slot& slot : set) {
    const uint64_t ordinal = slot.where >> 40;
    const uint64_t offset = (slot.where & ((uint64_t{1} << 40) - 1)) * layout::frame_alignment;
    if (slot.hash == hash && slot.where != 0 && ordinal < packs_.size()) {
      found.push_back({packs_[ordinal], offset});
    }
  }
  return found;
}

Status ContentIndex::add(const StorePaths& paths, const std::string& name,
                         const layout::ImageId& pack, std::span<const layout::PackFrame> frames) {
  const std::string packs_name = packs_path(paths, name);
  const std::string hints_name = hints_path(paths, name);
  std::vector<layout::ImageId> packs = read_packs(packs_name);
  const auto ordinal = static_cast<uint64_t>(std::ranges::find(packs, pack) - packs.begin());
  if (ordinal == max_packs) return {};
  if (ordinal == packs.size()) {
    packs.push_back(pack);
    const Fd fd = VMSNAP_TRY(open_file(packs_name, O_WRONLY | O_CREAT));
    VMSNAP_CHECK(write_all_at(fd.get(), std::as_bytes(std::span(&pack, 1)),
                              ordinal * sizeof pack, packs_name));
  }

  Fd hints(::open(hints_name.c_str(), O_RDWR | O_CLOEXEC));
  Header header = {};
  if (!hints || !read_header(hints.get(), header)) header = {index_magic, 0, 0};
  header.added += frames.size();
  if (sets_for(header.added) > header.set_count) {
    // Much of what was ever added may be gone: count what is not.
    std::vector<bool> alive;
    for (const auto& id : packs) alive.push_back(::access(paths.pack(id).c_str(), F_OK) == 0);
    const uint64_t old_sets = header.set_count;
    uint64_t live = 0;
    VMSNAP_CHECK(visit_live(hints.get(), old_sets, alive, hints_name,
                            [&](uint64_t, std::span<const Set> window) -> Status {
                              for (const Set& set : window) {
                                live += ways - static_cast<size_t>(
                                                   std::ranges::count(set, 0u, &Slot::where));
                              }
                              return {};
                            }));
    header.added = live + frames.size();
    header.set_count = std::max(old_sets, sets_for(header.added));
    VMSNAP_CHECK(make_index(hints_name, hints.get(), old_sets, header, alive));
    hints = VMSNAP_TRY(open_file(hints_name, O_RDWR));
  }

  // In the order of the sets, so that the file is gone through once.
  std::vector<layout::PackFrame> sorted(frames.begin(), frames.end());
  const uint64_t sets = header.set_count;
  std::ranges::sort(sorted, {}, [&](const layout::PackFrame& f) { return set_of(f.hash, sets); });
  std::vector<Set> window;
  for (size_t i = 0; i < sorted.size();) {
    const uint64_t first = set_of(sorted[i].hash, sets);
    size_t end = i + 1;
    while (end < sorted.size() && set_of(sorted[end].hash, sets) < first + window_sets / 64) ++end;
    window.resize(set_of(sorted[end - 1].hash, sets) - first + 1);
    const uint64_t place = sets_begin + first * sizeof(Set);
    const auto bytes = std::as_writable_bytes(std::span(window));
    VMSNAP_CHECK(read_exact_at(hints.get(), bytes, place, hints_name));
    for (; i < end; ++i) {
      insert(window[set_of(sorted[i].hash, sets) - first],
             {sorted[i].hash, ordinal << 40 | sorted[i].offset / layout::frame_alignment});
    }
    VMSNAP_CHECK(write_all_at(hints.get(), bytes, place, hints_name));
  }
  return write_all_at(hints.get(), std::as_bytes(std::span(&header, 1)), 0, hints_name);
}

}  // namespace vmsnap
