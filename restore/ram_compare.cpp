// That an image holds what is in memory, before the memory is dropped.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <thread>

#include "formats/file.h"
#include "formats/interrupt.h"
#include "formats/processors.h"
#include "formats/thread.h"
#include "restore/ram_drop.h"
#include "snap/vmm/pagemap.h"

namespace vmsnap {

namespace {

// Compares memory with an image, a run of pages at a time. One for each thread.
class Comparison {
 public:
  Comparison(const Process& process, const ImageReader& image, const PageMap& map)
      : process_(process), image_(image), map_(map), buffer_(256 << 10) {}

  // `range` is of the piece.
  Status compare(const MemoryPiece& piece, RemoteRange range) {
    if (piece.shared()) {
      // What is not mapped may be in the file all the same.
      return compare_bytes(piece, range, [&](RemotePtr at, std::span<std::byte> to) {
        return read_exact_at(piece.file->get(), to, piece.file_offset + (at - piece.range.start),
                       "the memory of " + process_.describe());
      });
    }
    RemotePtr at = range.start;
    for (const RemoteRange& run : VMSNAP_TRY(map_.populated(range))) {
      VMSNAP_CHECK(expect_zeros(piece, {at, run.start - at}));
      VMSNAP_CHECK(compare_bytes(piece, run, [&](RemotePtr from, std::span<std::byte> to) {
        return process_.read(from, to);
      }));
      at = run.end();
    }
    return expect_zeros(piece, {at, range.end() - at});
  }

 private:
  static uint64_t page_at(const MemoryPiece& piece, RemotePtr at) {
    return piece.first_page + (at - piece.range.start) / page_size;
  }

  tl::unexpected<Error> differs(uint64_t page) const {
    return tl::unexpected(
        Error(ErrorCode::vm, fmt::format("page {} of {} is not what {} has in its memory", page,
                                         image_.path(), process_.describe()))
            .with_remedy("Somebody resumed the VM after it was captured, or the image is damaged: "
                         "verify it, and try again."));
  }

  // Absent pages of private memory are zero, and must not be read: that would
  // wait for them.
  Status expect_zeros(const MemoryPiece& piece, RemoteRange range) {
    const uint64_t data = VMSNAP_TRY(image_.next_data_page(page_at(piece, range.start)));
    if (data < page_at(piece, range.end())) return differs(data);
    return {};
  }

  template <typename Read>
  Status compare_bytes(const MemoryPiece& piece, RemoteRange range, const Read& read) {
    for (RemotePtr at = range.start; at < range.end();) {
      const auto bytes =
          std::span(buffer_).first(std::min<uint64_t>(buffer_.size(), range.end() - at));
      VMSNAP_CHECK(read(at, bytes));
      for (size_t offset = 0; offset < bytes.size(); offset += page_size) {
        const uint64_t page = page_at(piece, at + offset);
        VMSNAP_TRY(image_.read_page(page, page_));
        if (std::memcmp(page_.data(), bytes.data() + offset, page_size) != 0) return differs(page);
      }
      at = at + bytes.size();
    }
    return {};
  }

  const Process& process_;
  const ImageReader& image_;
  const PageMap& map_;
  std::vector<std::byte> buffer_;
  std::array<std::byte, page_size> page_;
};

}  // namespace

Status compare_memory(const Process& process, const ImageReader& image, const GuestMemory& memory) {
  struct Share {
    const MemoryPiece* piece;
    RemoteRange range;
  };
  std::vector<Share> shares;
  constexpr uint64_t share_bytes = 8 << 20;
  for (const MemoryPiece& piece : memory.pieces) {
    for (RemotePtr at = piece.range.start; at < piece.range.end(); at = at + share_bytes) {
      shares.push_back({&piece, {at, std::min(share_bytes, piece.range.end() - at)}});
    }
  }
  const PageMap map = VMSNAP_TRY(PageMap::open(process));
  std::atomic<size_t> next = 0;
  std::atomic<bool> failed = false;
  const auto work = [&]() -> Status {
    Comparison comparison(process, image, map);
    for (size_t i = next++; i < shares.size() && !failed; i = next++) {
      VMSNAP_CHECK(check_interrupted());
      VMSNAP_CHECK(comparison.compare(*shares[i].piece, shares[i].range));
    }
    return {};
  };
  std::vector<Status> ended(default_threads());
  std::atomic<size_t> begun = 0;
  const auto work_as_one = [&] {
    Status& end = ended[begun++];
    end = work();
    if (!end) failed = true;
  };
  // This thread is one, and if there is room for no other does it all.
  auto others = start_threads(ended.size() - 1, work_as_one);
  work_as_one();
  if (others) {
    for (std::thread& thread : *others) thread.join();
  }
  for (Status& end : ended) VMSNAP_CHECK(std::move(end));
  return {};
}

}  // namespace vmsnap
