#include "formats/frame_walk.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "formats/damage.h"
#include "formats/interrupt.h"
#include "formats/page_codec.h"

namespace vmsnap {

namespace {

// A window that moves through the file, front to back.
class Window {
 public:
  Window(const ImageFile& file, uint64_t offset) : file_(file), begin_(offset) {}

  // The bytes offset..+length; they stay valid until the next call. Offsets
  // must not decrease, and length is at most a frame of 16 pages.
  Result<std::span<const std::byte>> at(uint64_t offset, size_t length) {
    const uint64_t end = file_.trailer().frames_end;
    if (offset > end || length > end - offset) {
      return damaged(file_.path(), "the page frame before byte {} is longer than it can be",
                     offset);
    }
    if (offset + length > begin_ + bytes_.size()) {
      bytes_.resize(std::min<uint64_t>(window_size, end - offset));
      begin_ = offset;
      VMSNAP_CHECK(file_.source().read_exact(begin_, bytes_));
    }
    return std::span<const std::byte>(bytes_).subspan(offset - begin_, length);
  }

 private:
  static constexpr uint64_t window_size = 1 << 20;
  static_assert(window_size > 2 * layout::max_frame_bytes(layout::max_frame_pages));

  const ImageFile& file_;
  uint64_t begin_;
  std::vector<std::byte> bytes_;
};

layout::FrameHeader header_from(std::span<const std::byte> bytes) {
  layout::FrameHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  return header;
}

}  // namespace

Result<FrameWalk> walk_frames(const ImageFile& file, const std::function<void(const Error&)>& found,
                              const std::function<void(uint64_t offset)>& progress) {
  const std::string& path = file.path();
  const uint64_t mark = file.trailer().frames_end - sizeof(layout::FrameHeader);
  FrameDecoder decoder;
  FrameWalk walk;
  Window window(file, layout::frames_begin);
  uint64_t offset = layout::frames_begin;
  while (offset < mark) {
    VMSNAP_CHECK(check_interrupted());
    progress(offset);
    const layout::FrameHeader header =
        header_from(VMSNAP_TRY(window.at(offset, sizeof(layout::FrameHeader))));
    if (!FrameDecoder::plausible(header, /*sealed=*/false)) {
      return damaged(path, "there is no page frame at byte {}, where one must be", offset);
    }
    if (header.codec == layout::codec_delta &&
        (file.header().incompatible & layout::incompatible_deltas) == 0) {
      found(damage(path, "the page frame at byte {} is a delta, and its header says there is none",
                   offset));
    }
    const size_t used = sizeof header + header.stored_length;
    const size_t aligned = layout::align_up(used, layout::frame_alignment);
    const std::span<const std::byte> frame = VMSNAP_TRY(window.at(offset, aligned));
    if (!decoder.intact(header, frame.subspan(sizeof header, header.stored_length),
                        {.offset = offset, .seed = file.image_seed()})) {
      found(damage(path, "the checksum of the page frame at byte {} does not match", offset));
    }
    if (std::ranges::any_of(frame.subspan(used), [](std::byte b) { return b != std::byte{0}; })) {
      found(damage(path, "the padding after the page frame at byte {} is not zero", offset));
    }
    ++walk.frames;
    walk.pages += FrameDecoder::pages(header);
    offset += aligned;
  }

  const layout::FrameHeader header =
      header_from(VMSNAP_TRY(window.at(offset, sizeof(layout::FrameHeader))));
  const bool is_mark = header.codec == layout::codec_end && header.last_slot == 0 &&
                       header.flags == 0 && header.stored_length == 0;
  if (!is_mark || !decoder.intact(header, {}, {.offset = offset, .seed = file.image_seed()})) {
    return damaged(path, "the end mark of its page frames, at byte {}, is wrong", offset);
  }
  return walk;
}

}  // namespace vmsnap
