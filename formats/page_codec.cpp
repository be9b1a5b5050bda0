#include "formats/page_codec.h"

#include <cstring>

namespace vmsnap {

namespace {

constexpr size_t checked_header_bytes = offsetof(layout::FrameHeader, checksum);

uint64_t frame_checksum(StreamChecksum& checksum, const layout::FrameHeader& header,
                        std::span<const std::byte> payload, uint64_t seed) {
  checksum.reset(seed);
  checksum.add(std::as_bytes(std::span(&header, 1)).first(checked_header_bytes));
  checksum.add(payload);
  return checksum.value();
}

}  // namespace

FrameEncoder::FrameEncoder() : context_(ZSTD_createCCtx(), ZSTD_freeCCtx) {}

void FrameEncoder::set_level(int level) {
  ZSTD_CCtx_setParameter(context_.get(), ZSTD_c_compressionLevel, level);
}

size_t FrameEncoder::encode(std::span<const std::byte, page_size> page, std::span<std::byte> out) {
  std::byte* payload = out.data() + sizeof(layout::FrameHeader);
  layout::FrameHeader header = {.codec = layout::codec_zstd};
  // One byte less than the page: what does not fit is not worth decompressing.
  size_t length = ZSTD_compress2(context_.get(), payload, page_size - 1, page.data(), page.size());
  if (ZSTD_isError(length)) {
    header.codec = layout::codec_raw;
    length = page.size();
    std::memcpy(payload, page.data(), page.size());
  }
  header.stored_length = static_cast<uint32_t>(length);
  std::memcpy(out.data(), &header, sizeof header);

  const size_t used = sizeof header + length;
  const size_t aligned = layout::align_up(used, layout::frame_alignment);
  std::memset(out.data() + used, 0, aligned - used);
  return aligned;
}

void FrameEncoder::seal(std::span<std::byte> frame, uint64_t seed) {
  layout::FrameHeader header;
  std::memcpy(&header, frame.data(), sizeof header);
  header.checksum =
      frame_checksum(checksum_, header, frame.subspan(sizeof header, header.stored_length), seed);
  std::memcpy(frame.data(), &header, sizeof header);
}

FrameDecoder::FrameDecoder() : context_(ZSTD_createDCtx(), ZSTD_freeDCtx) {}

bool FrameDecoder::plausible(const layout::FrameHeader& header) {
  if (header.last_slot >= layout::max_frame_pages || header.reserved != 0) return false;
  const size_t bytes = pages(header) * page_size;
  if (header.codec == layout::codec_raw) return header.stored_length == bytes;
  return header.codec == layout::codec_zstd && header.stored_length > 0 &&
         header.stored_length <= bytes;
}

bool FrameDecoder::intact(const layout::FrameHeader& header, std::span<const std::byte> payload,
                          uint64_t seed) {
  return frame_checksum(checksum_, header, payload, seed) == header.checksum;
}

bool FrameDecoder::decode(const layout::FrameHeader& header, std::span<const std::byte> payload,
                          std::span<std::byte> out) {
  if (header.codec == layout::codec_raw) {
    if (payload.size() != out.size()) return false;
    std::memcpy(out.data(), payload.data(), payload.size());
    return true;
  }
  const size_t got =
      ZSTD_decompressDCtx(context_.get(), out.data(), out.size(), payload.data(), payload.size());
  return !ZSTD_isError(got) && got == out.size();
}

}  // namespace vmsnap
