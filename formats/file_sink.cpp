#include "formats/file_sink.h"

#include <cerrno>
#include <utility>

#include "formats/file.h"
#include "formats/frame_reader.h"
#include "formats/image_layout.h"
#include "formats/page_codec.h"

namespace vmsnap {

FileSink::FileSink(int fd, std::string name, uint64_t seed)
    : fd_(fd), name_(std::move(name)), seed_(seed), end_(layout::frames_begin) {}

Result<FramePlace> FileSink::reserve(uint64_t bytes) {
  const uint64_t offset = end_.fetch_add(bytes, std::memory_order_relaxed);
  if (offset + bytes > layout::max_file_length) {
    return fail_errno(EFBIG, "cannot write {}: an image ends at 8 TiB", name_);
  }
  return FramePlace{.offset = offset, .seed = seed_};
}

Status FileSink::write(const FramePlace& place, std::span<const std::byte> frames,
                       std::span<const FrameNote>) {
  return write_all_at(fd_, frames, place.offset, name_);
}

Status FileSink::read(uint64_t entry, std::span<std::byte, page_size> out) const {
  const FrameSource source = {fd_, name_, seed_, end_.load(std::memory_order_relaxed)};
  return read_stored_page(source, entry, out);
}

Result<uint64_t> FileSink::close() {
  const uint64_t offset = end_;
  const auto mark = end_mark({.offset = offset, .seed = seed_});
  VMSNAP_CHECK(write_all_at(fd_, std::as_bytes(std::span(&mark, 1)), offset, name_));
  return offset + sizeof mark;
}

}  // namespace vmsnap
