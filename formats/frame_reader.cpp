#include "formats/frame_reader.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

#include "formats/byte_source.h"
#include "formats/damage.h"
#include "formats/file.h"
#include "formats/page_codec.h"
#include "formats/page_entry.h"

namespace vmsnap {

namespace {

// A thread that reads one page mostly reads more: its buffers and its
// decompression state are kept until it ends.
struct Scratch {
  FrameDecoder decoder;
  std::vector<std::byte> frame = std::vector<std::byte>(layout::max_frame_bytes(1));
  std::vector<std::byte> base_frame = frame;  // of a delta frame's base
  std::array<std::byte, page_size> base;
  std::vector<std::byte> pages;  // only for frames of several pages
};

Scratch& scratch_of_this_thread() {
  thread_local Scratch scratch;
  return scratch;
}

// Up to bytes.size() bytes, fewer only at the end of the file: the last frame
// of a file being written is mostly shorter than what is asked for here.
Result<size_t> read_up_to(const FrameSource& source, std::span<std::byte> bytes, uint64_t offset) {
  if (source.bytes) {
    const uint64_t left = source.bytes->size() - std::min(offset, source.bytes->size());
    const auto some = bytes.first(std::min<uint64_t>(bytes.size(), left));
    VMSNAP_CHECK(source.bytes->read_exact(offset, some));
    return some.size();
  }
  size_t got = 0;
  while (got < bytes.size()) {
    const ssize_t now =
        ::pread(source.fd, bytes.data() + got, bytes.size() - got, static_cast<off_t>(offset + got));
    if (now < 0 && errno == EINTR) continue;
    if (now < 0) return fail_errno(errno, "cannot read {} at byte {}", source.name, offset);
    if (now == 0) break;
    got += static_cast<size_t>(now);
  }
  return got;
}

bool can_begin_at(const FrameSource& source, uint64_t offset) {
  return offset >= layout::frames_begin && offset < source.end &&
         source.end - offset >= sizeof(layout::FrameHeader);
}

struct Frame {
  layout::FrameHeader header;
  std::span<const std::byte> content;  // decrypted
};

// A frame that is where can_begin_at() says one may be, checked, in `buffer`,
// which has room for a frame of one page, and grows.
Result<Frame> read_frame(const FrameSource& source, uint64_t offset, FrameDecoder& decoder,
                         std::vector<std::byte>& buffer) {
  const uint64_t room = source.end - offset;
  // As much as a frame of one page can be, so that most reads are one call.
  const size_t first = std::min<uint64_t>(room, layout::max_frame_bytes(1));
  const size_t have = VMSNAP_TRY(read_up_to(source, std::span(buffer).first(first), offset));
  Frame frame;
  if (have < sizeof frame.header) {
    return damaged(source.name, "it ends inside the page frame at byte {}", offset);
  }
  std::memcpy(&frame.header, buffer.data(), sizeof frame.header);
  const size_t need = sizeof frame.header + frame.header.stored_length;
  if (!FrameDecoder::plausible(frame.header, source.key != nullptr) || need > room) {
    return damaged(source.name, "the page frame at byte {} has an impossible header", offset);
  }
  if (need > have) {
    if (buffer.size() < need) buffer.resize(need);
    const auto rest = std::span(buffer).subspan(have, need - have);
    if (VMSNAP_TRY(read_up_to(source, rest, offset + have)) < rest.size()) {
      return damaged(source.name, "it ends inside the page frame at byte {}", offset);
    }
  }
  const FrameSite site = {offset, source.seed, source.key};
  const auto payload =
      std::span(buffer).subspan(sizeof frame.header, frame.header.stored_length);
  if (!decoder.intact(frame.header, payload, site)) {
    return damaged(source.name, "the checksum of the page frame at byte {} does not match", offset);
  }
  const auto content = decoder.open(frame.header, payload, site);
  if (!content) {
    return damaged(source.name, "the page frame at byte {} was not sealed with its key", offset);
  }
  frame.content = *content;
  return frame;
}

// The page of the base at `offset` of the delta frame at `delta`, into scratch.base.
Status read_base(const FrameSource& source, uint64_t offset, uint64_t delta, Scratch& scratch) {
  if (offset >= delta || !can_begin_at(source, offset)) {
    return damaged(source.name, "the page frame at byte {} has an impossible base, at byte {}",
                   delta, offset);
  }
  const Frame base = VMSNAP_TRY(read_frame(source, offset, scratch.decoder, scratch.base_frame));
  if (base.header.codec == layout::codec_delta || base.header.last_slot != 0) {
    return damaged(source.name, "the page frame at byte {} has a base, at byte {}, that cannot be one",
                   delta, offset);
  }
  if (!scratch.decoder.decode(base.header, base.content, {}, scratch.base)) {
    return damaged(source.name, "the page frame at byte {} cannot be decoded to its page", offset);
  }
  return {};
}

}  // namespace

Result<FrameSource> OwnFrames::source(uint64_t pack) const {
  if (pack != 0) return damaged(source_.name, "a page entry refers to pack {}", pack);
  return source_;
}

Status read_stored_page(const FrameFiles& files, uint64_t entry_bits,
                        std::span<std::byte, page_size> out) {
  const FrameSource source = VMSNAP_TRY(files.source(PageEntry::from_bits(entry_bits).pack));
  return read_stored_page(source, entry_bits, out);
}

Status read_stored_page(const FrameSource& source, uint64_t entry_bits,
                        std::span<std::byte, page_size> out) {
  const PageEntry entry = PageEntry::from_bits(entry_bits);
  if (entry.kind != PageEntry::kind_frame || !can_begin_at(source, entry.offset)) {
    return damaged(source.name, "a page entry refers to no frame ({:#018x})", entry_bits);
  }
  Scratch& scratch = scratch_of_this_thread();
  const Frame frame = VMSNAP_TRY(read_frame(source, entry.offset, scratch.decoder, scratch.frame));
  if (entry.slot > frame.header.last_slot) {
    return damaged(source.name, "a page entry refers to no page of the frame at byte {}",
                   entry.offset);
  }
  if (frame.header.codec == layout::codec_delta) {
    VMSNAP_CHECK(read_base(source, FrameDecoder::base_offset(frame.content), entry.offset, scratch));
  }
  const size_t pages = FrameDecoder::pages(frame.header);
  std::span<std::byte> decoded = out;
  if (pages > 1) {
    scratch.pages.resize(pages * page_size);
    decoded = scratch.pages;
  }
  if (!scratch.decoder.decode(frame.header, frame.content, scratch.base, decoded)) {
    return damaged(source.name, "the page frame at byte {} cannot be decoded to its {} pages",
                   entry.offset, pages);
  }
  if (pages > 1) {
    std::memcpy(out.data(), scratch.pages.data() + entry.slot * page_size, page_size);
  }
  return {};
}

Result<uint64_t> base_of_stored_page(const FrameSource& source, uint64_t offset) {
  if (!can_begin_at(source, offset)) return damaged(source.name, "no frame is at byte {}", offset);
  Scratch& scratch = scratch_of_this_thread();
  const Frame frame = VMSNAP_TRY(read_frame(source, offset, scratch.decoder, scratch.frame));
  return frame.header.codec == layout::codec_delta ? FrameDecoder::base_offset(frame.content) : 0;
}

}  // namespace vmsnap
