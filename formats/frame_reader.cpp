#include "formats/frame_reader.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "formats/byte_source.h"
#include "formats/damage.h"
#include "formats/file.h"
#include "formats/page_codec.h"
#include "formats/page_entry.h"

namespace vmsnap {

namespace {

// What a thread has read of one complete file beyond what it was asked for.
class ReadAhead {
 public:
  bool is_of(const FrameSource& source) const { return source.opening == opening_; }

  // The bytes at `offset`, below the source's end, all of them, or false: they are
  // to be read alone. Reads more only for who comes from just before, so that single pages cost no more.
  bool read(const FrameSource& source, std::span<std::byte> bytes, uint64_t offset) {
    if (!is_of(source)) begin(source);
    const uint64_t end = offset_ + held_;
    const uint64_t last = std::exchange(last_, offset);
    if (offset >= offset_ && offset < end && end - offset >= bytes.size()) {
      std::memcpy(bytes.data(), &bytes_[offset - offset_], bytes.size());
      return true;
    }
    const bool follows = offset > last && offset - last <= near;
    const bool goes_on = offset >= offset_ && offset <= end + near;  // with others in between
    if (!follows && !goes_on) return false;
    bytes_.resize(at_once);
    held_ = 0;
    const size_t wanted = std::min<uint64_t>(at_once, source.end - offset);
    const ssize_t got = ::pread(source.fd, bytes_.data(), wanted, static_cast<off_t>(offset));
    // What cannot be read is the next one's to say, who reads it alone.
    if (got < static_cast<ssize_t>(bytes.size())) return false;
    offset_ = offset;
    held_ = static_cast<size_t>(got);
    std::memcpy(bytes.data(), bytes_.data(), bytes.size());
    return true;
  }

 private:
  void begin(const FrameSource& source) {
    opening_ = source.opening;
    last_ = offset_ = held_ = 0;
  }

  static constexpr size_t at_once = 32 << 10;
  static constexpr uint64_t near = 8 << 10;

  uint64_t opening_ = 0;
  uint64_t last_ = 0;    // where was read last
  uint64_t offset_ = 0;  // of what is held
  size_t held_ = 0;
  std::vector<std::byte> bytes_;
};

// A thread that reads one page mostly reads more: its buffers and its
// decompression state are kept until it ends.
struct Scratch {
  // Neighbours in memory are in a few packs.
  std::array<ReadAhead, 8> ahead;
  size_t oldest_ahead = 0;
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

ReadAhead& ahead_of(const FrameSource& source, Scratch& scratch) {
  for (ReadAhead& ahead : scratch.ahead) {
    if (ahead.is_of(source)) return ahead;
  }
  return scratch.ahead[scratch.oldest_ahead++ % scratch.ahead.size()];
}

// Up to bytes.size() bytes, fewer only at the end of the file: the last frame
// of a file being written is mostly shorter than what is asked for here.
Result<size_t> read_up_to(const FrameSource& source, std::span<std::byte> bytes, uint64_t offset,
                          Scratch& scratch) {
  if (source.bytes) {
    const uint64_t left = source.bytes->size() - std::min(offset, source.bytes->size());
    const auto some = bytes.first(std::min<uint64_t>(bytes.size(), left));
    VMSNAP_CHECK(source.bytes->read_exact(offset, some));
    return some.size();
  }
  if (source.opening != 0 && ahead_of(source, scratch).read(source, bytes, offset)) return bytes.size();
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
Result<Frame> read_frame(const FrameSource& source, uint64_t offset, Scratch& scratch,
                         std::vector<std::byte>& buffer) {
  FrameDecoder& decoder = scratch.decoder;
  const uint64_t room = source.end - offset;
  // As much as a frame of one page can be, so that most reads are one call.
  const size_t first = std::min<uint64_t>(room, layout::max_frame_bytes(1));
  const size_t have = VMSNAP_TRY(read_up_to(source, std::span(buffer).first(first), offset, scratch));
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
    if (VMSNAP_TRY(read_up_to(source, rest, offset + have, scratch)) < rest.size()) {
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
  const Frame base = VMSNAP_TRY(read_frame(source, offset, scratch, scratch.base_frame));
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

uint64_t next_opening() {
  static std::atomic<uint64_t> last = 0;
  return ++last;
}

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
  const Frame frame = VMSNAP_TRY(read_frame(source, entry.offset, scratch, scratch.frame));
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
  const Frame frame = VMSNAP_TRY(read_frame(source, offset, scratch, scratch.frame));
  return frame.header.codec == layout::codec_delta ? FrameDecoder::base_offset(frame.content) : 0;
}

}  // namespace vmsnap
