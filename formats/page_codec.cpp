#include "formats/page_codec.h"

#include <cstring>

#include "formats/seal.h"

namespace vmsnap {

namespace {

constexpr size_t base_offset_bytes = sizeof(uint64_t);
constexpr size_t checked_header_bytes = offsetof(layout::FrameHeader, checksum);

// What is checked, and authenticated, beside the payload.
std::span<const std::byte> sealed_along(const layout::FrameHeader& header) {
  return std::as_bytes(std::span(&header, 1)).first(checked_header_bytes);
}

uint64_t frame_checksum(StreamChecksum& checksum, const layout::FrameHeader& header,
                        std::span<const std::byte> payload, const FrameSite& site) {
  checksum.reset(layout::seed_at(site.seed, site.offset));
  checksum.add(sealed_along(header));
  checksum.add(payload);
  return checksum.value();
}

}  // namespace

FrameEncoder::FrameEncoder() : context_(ZSTD_createCCtx(), ZSTD_freeCCtx) {}

void FrameEncoder::set_level(int level) {
  ZSTD_CCtx_setParameter(context_.get(), ZSTD_c_compressionLevel, level);
}

size_t FrameEncoder::encode(std::span<const std::byte, page_size> page, bool sealed,
                            std::span<std::byte> out) {
  std::byte* payload = out.data() + sizeof(layout::FrameHeader);
  layout::FrameHeader header = {.codec = layout::codec_zstd};
  // One byte less than the page: what does not fit is not worth decompressing.
  size_t length = ZSTD_compress2(context_.get(), payload, page_size - 1, page.data(), page.size());
  if (ZSTD_isError(length)) {
    header.codec = layout::codec_raw;
    length = page.size();
    std::memcpy(payload, page.data(), page.size());
  }
  return add_header(header, length, sealed, out);
}

size_t FrameEncoder::encode_delta(std::span<const std::byte, page_size> page,
                                  std::span<const std::byte, page_size> base, bool sealed,
                                  size_t limit, std::span<std::byte> out) {
  const size_t around = sizeof(layout::FrameHeader) + base_offset_bytes +
                        (sealed ? layout::seal_tag_bytes : 0) + layout::frame_alignment;
  if (limit <= around) return 0;
  // A frame that did not fit has left the context in the middle of it.
  ZSTD_CCtx_reset(context_.get(), ZSTD_reset_session_only);
  ZSTD_CCtx_refPrefix(context_.get(), base.data(), base.size());  // for one frame
  const size_t length =
      ZSTD_compress2(context_.get(), out.data() + sizeof(layout::FrameHeader) + base_offset_bytes,
                     limit - around, page.data(), page.size());
  if (ZSTD_isError(length)) return 0;
  set_base(out, 0);
  return add_header({.codec = layout::codec_delta}, base_offset_bytes + length, sealed, out);
}

void FrameEncoder::set_base(std::span<std::byte> frame, uint64_t offset) {
  std::memcpy(frame.data() + sizeof(layout::FrameHeader), &offset, sizeof offset);
}

// Around the `length` bytes that are in their place. Returns what all take.
size_t FrameEncoder::add_header(layout::FrameHeader header, size_t length, bool sealed,
                                std::span<std::byte> out) {
  header.flags = sealed ? layout::frame_sealed : 0;
  header.stored_length = static_cast<uint32_t>(length + (sealed ? layout::seal_tag_bytes : 0));
  std::memcpy(out.data(), &header, sizeof header);
  const size_t aligned =
      layout::align_up(sizeof header + header.stored_length, layout::frame_alignment);
  std::memset(out.data() + sizeof header + length, 0, aligned - sizeof header - length);
  return aligned;
}

void FrameEncoder::finish(std::span<std::byte> frame, const FrameSite& site) {
  layout::FrameHeader header;
  std::memcpy(&header, frame.data(), sizeof header);
  const auto payload = frame.subspan(sizeof header, header.stored_length);
  if (site.key) {
    seal(*site.key, site.offset, sealed_along(header),
         payload.first(payload.size() - layout::seal_tag_bytes),
         payload.last<layout::seal_tag_bytes>());
  }
  header.checksum = frame_checksum(checksum_, header, payload, site);
  std::memcpy(frame.data(), &header, sizeof header);
}

layout::FrameHeader end_mark(const FrameSite& site) {
  StreamChecksum checksum;
  layout::FrameHeader mark = {.codec = layout::codec_end};
  mark.checksum = frame_checksum(checksum, mark, {}, site);
  return mark;
}

FrameDecoder::FrameDecoder() : context_(ZSTD_createDCtx(), ZSTD_freeDCtx) {}

bool FrameDecoder::plausible(const layout::FrameHeader& header, bool sealed) {
  if (header.last_slot >= layout::max_frame_pages) return false;
  if (header.flags != (sealed ? layout::frame_sealed : 0)) return false;
  const size_t tag = sealed ? layout::seal_tag_bytes : 0;
  const size_t bytes = pages(header) * page_size;
  const size_t length = header.stored_length;
  switch (header.codec) {
    case layout::codec_raw: return length == bytes + tag;
    case layout::codec_zstd: return length > tag && length <= bytes + tag;
    case layout::codec_delta:
      return header.last_slot == 0 && length > base_offset_bytes + tag && length <= bytes + tag;
    default: return false;
  }
}

bool FrameDecoder::intact(const layout::FrameHeader& header, std::span<const std::byte> payload,
                          const FrameSite& site) {
  return frame_checksum(checksum_, header, payload, site) == header.checksum;
}

std::optional<std::span<const std::byte>> FrameDecoder::open(const layout::FrameHeader& header,
                                                             std::span<std::byte> payload,
                                                             const FrameSite& site) {
  if (!site.key) return payload;
  const auto tag = payload.last<layout::seal_tag_bytes>();
  const auto content = payload.first(payload.size() - tag.size());
  if (!unseal(*site.key, site.offset, sealed_along(header), content, tag)) return std::nullopt;
  return content;
}

uint64_t FrameDecoder::base_offset(std::span<const std::byte> content) {
  uint64_t offset;
  std::memcpy(&offset, content.data(), sizeof offset);
  return offset;
}

bool FrameDecoder::decode(const layout::FrameHeader& header, std::span<const std::byte> content,
                          std::span<const std::byte> base, std::span<std::byte> out) {
  if (header.codec == layout::codec_raw) {
    if (content.size() != out.size()) return false;
    std::memcpy(out.data(), content.data(), content.size());
    return true;
  }
  if (header.codec == layout::codec_delta) {
    content = content.subspan(base_offset_bytes);
    ZSTD_DCtx_refPrefix(context_.get(), base.data(), base.size());  // for one frame
  }
  const size_t got =
      ZSTD_decompressDCtx(context_.get(), out.data(), out.size(), content.data(), content.size());
  return !ZSTD_isError(got) && got == out.size();
}

}  // namespace vmsnap
