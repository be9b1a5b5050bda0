#include "formats/frame_reader.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

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
  std::vector<std::byte> pages;  // only for frames of several pages
};

Scratch& scratch_of_this_thread() {
  thread_local Scratch scratch;
  return scratch;
}

// Up to bytes.size() bytes, fewer only at the end of the file: the last frame
// of a file being written is mostly shorter than what is asked for here.
Result<size_t> read_up_to(int fd, std::span<std::byte> bytes, uint64_t offset,
                          const std::string& name) {
  size_t got = 0;
  while (got < bytes.size()) {
    const ssize_t now =
        ::pread(fd, bytes.data() + got, bytes.size() - got, static_cast<off_t>(offset + got));
    if (now < 0 && errno == EINTR) continue;
    if (now < 0) return fail_errno(errno, "cannot read {} at byte {}", name, offset);
    if (now == 0) break;
    got += static_cast<size_t>(now);
  }
  return got;
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
  if (entry.kind != PageEntry::kind_frame || entry.offset < layout::frames_begin || entry.offset >= source.end ||
      source.end - entry.offset < sizeof(layout::FrameHeader)) {
    return damaged(source.name, "a page entry refers to no frame ({:#018x})", entry_bits);
  }
  const uint64_t room = source.end - entry.offset;

  // As much as a frame of one page can be, so that most reads are one call.
  Scratch& scratch = scratch_of_this_thread();
  const size_t first = std::min<uint64_t>(room, layout::max_frame_bytes(1));
  const size_t have = VMSNAP_TRY(
      read_up_to(source.fd, std::span(scratch.frame).first(first), entry.offset, source.name));
  if (have < sizeof(layout::FrameHeader)) {
    return damaged(source.name, "it ends inside the page frame at byte {}", entry.offset);
  }
  layout::FrameHeader header;
  std::memcpy(&header, scratch.frame.data(), sizeof header);
  const size_t need = sizeof header + header.stored_length;
  if (!FrameDecoder::plausible(header, source.key != nullptr) || need > room || entry.slot > header.last_slot) {
    return damaged(source.name, "the page frame at byte {} has an impossible header", entry.offset);
  }
  if (need > have) {
    if (scratch.frame.size() < need) scratch.frame.resize(need);
    VMSNAP_CHECK(read_exact_at(source.fd, std::span(scratch.frame).subspan(have, need - have),
                               entry.offset + have, source.name));
  }

  const FrameSite site = {entry.offset, source.seed, source.key};
  const auto payload = std::span(scratch.frame).subspan(sizeof header, header.stored_length);
  if (!scratch.decoder.intact(header, payload, site)) {
    return damaged(source.name, "the checksum of the page frame at byte {} does not match",
                   entry.offset);
  }
  const size_t pages = FrameDecoder::pages(header);
  std::span<std::byte> decoded = out;
  if (pages > 1) {
    scratch.pages.resize(pages * page_size);
    decoded = scratch.pages;
  }
  if (!scratch.decoder.decode(header, payload, site, decoded)) {
    return damaged(source.name, "the page frame at byte {} cannot be decoded to its {} pages",
                   entry.offset, pages);
  }
  if (pages > 1) {
    std::memcpy(out.data(), scratch.pages.data() + entry.slot * page_size, page_size);
  }
  return {};
}

}  // namespace vmsnap
