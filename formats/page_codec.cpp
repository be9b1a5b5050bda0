#include "formats/page_codec.h"

#include <cstring>

#include "formats/seal.h"

namespace vmsnap {

namespace {

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
  header.flags = sealed ? layout::frame_sealed : 0;
  header.stored_length = static_cast<uint32_t>(length + (sealed ? layout::seal_tag_bytes : 0));
  std::memcpy(out.data(), &header, sizeof header);

  const size_t aligned =
      layout::align_up(sizeof header + header.stored_length, layout::frame_alignment);
  std::memset(payload + length, 0, aligned - sizeof header - length);
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
  if (header.codec == layout::codec_raw) return header.stored_length == bytes + tag;
  return header.codec == layout::codec_zstd && header.stored_length > tag &&
         header.stored_length <= bytes + tag;
}

bool FrameDecoder::intact(const layout::FrameHeader& header, std::span<const std::byte> payload,
                          const FrameSite& site) {
  return frame_checksum(checksum_, header, payload, site) == header.checksum;
}

bool FrameDecoder::decode(const layout::FrameHeader& header, std::span<std::byte> payload,
                          const FrameSite& site, std::span<std::byte> out) {
  if (site.key) {
    const auto tag = payload.last<layout::seal_tag_bytes>();
    payload = payload.first(payload.size() - tag.size());
    if (!unseal(*site.key, site.offset, sealed_along(header), payload, tag)) return false;
  }
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
