#include "formats/image_file.h"

#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <span>

#include "formats/checked_block.h"
#include "formats/checksum.h"
#include "formats/damage.h"
#include "formats/digest.h"
#include "formats/metadata.h"

namespace vmsnap {

namespace {

tl::unexpected<Error> unsupported(const std::string& path, std::string_view what) {
  return tl::unexpected(Error(ErrorCode::unsupported, fmt::format("{} {}", path, what))
                            .with_remedy("Use a newer vmsnap."));
}

tl::unexpected<Error> cut_short(const std::string& path) {
  return tl::unexpected(
      Error(ErrorCode::damaged, path + " is cut short: it does not end as an image does")
          .with_remedy("Copy it again from where it is whole."));
}

// Decompressed bytes that a section of this type may have.
uint64_t max_raw_length(layout::SectionType type) {
  switch (type) {
    case layout::SectionType::metadata: return layout::max_metadata;
    case layout::SectionType::packs: return layout::max_packs_section;
    case layout::SectionType::working_set: return layout::max_working_set;
    case layout::SectionType::digest: return sizeof(Digest);
    default: return layout::max_device_state;
  }
}

// For errors.
std::string_view section_name(uint32_t type) {
  switch (layout::SectionType(type)) {
    case layout::SectionType::device_state: return "device state";
    case layout::SectionType::metadata: return "metadata";
    case layout::SectionType::packs: return "packs";
    case layout::SectionType::working_set: return "working set";
    case layout::SectionType::digest: return "digest";
    case layout::SectionType::none: break;
  }
  return "unknown";
}

bool known(uint32_t type) {
  return type != 0 && type <= static_cast<uint32_t>(layout::SectionType::digest);
}

}  // namespace

std::string id_text(const layout::ImageId& id) {
  std::string text;
  for (const uint8_t byte : id) text += fmt::format("{:02x}", byte);
  return text;
}

Result<ImageFile> ImageFile::open(const std::string& path) {
  std::unique_ptr<PlainSource> plain = VMSNAP_TRY(PlainSource::open(path));
  const int fd = plain->fd();
  ImageFile file = VMSNAP_TRY(open(std::shared_ptr<const ByteSource>(std::move(plain))));
  VMSNAP_CHECK(file.check_own_frames());
  file.frames_fd_ = fd;
  return file;
}

Status ImageFile::check_own_frames() const {
  if (!find_section(layout::SectionType::packs)) return {};
  return tl::unexpected(Error(ErrorCode::usage, path() + " is a snapshot in a store, not an image")
                            .with_remedy("Give --store DIR and the snapshot's id."));
}

Result<ImageFile> ImageFile::open(std::shared_ptr<const ByteSource> source) {
  ImageFile file;
  file.source_ = std::move(source);
  const uint64_t length = file.source_->size();
  VMSNAP_CHECK(file.read_header(length));
  VMSNAP_CHECK(file.read_trailer(length));
  VMSNAP_CHECK(file.check_trailer(length));
  VMSNAP_CHECK(file.check_sections());
  return file;
}

Status ImageFile::read_header(uint64_t file_length) {
  const auto bytes = std::as_writable_bytes(std::span(&header_, 1));
  const uint64_t have = std::min<uint64_t>(file_length, sizeof header_);
  VMSNAP_CHECK(source_->read_exact(0, bytes.first(have)));
  if (have < sizeof header_.magic || header_.magic != layout::header_magic) {
    return tl::unexpected(Error(ErrorCode::damaged, path() + " is not a vmsnap image")
                              .with_remedy("Give the file that 'vmsnap snapshot' made."));
  }
  if (have < sizeof header_) return cut_short(path());
  if (block_checksum(header_) != header_.checksum)
    return damaged(path(), "the checksum of its header does not match");
  if (header_.version != layout::format_version) {
    return unsupported(path(),
                       fmt::format("has image format version {}, newer than this vmsnap's {}",
                                   header_.version, layout::format_version));
  }
  if ((header_.incompatible & ~layout::known_incompatible) != 0) {
    return unsupported(path(), fmt::format("uses image features that this vmsnap lacks ({:#x})",
                                          header_.incompatible & ~layout::known_incompatible));
  }
  if (header_.reserved0 != 0 || !all_zero(header_.reserved)) {
    return damaged(path(), "its header uses reserved bytes");
  }
  return {};
}

Status ImageFile::read_trailer(uint64_t file_length) {
  if (file_length < sizeof header_ + sizeof trailer_ || file_length % layout::block_size != 0) {
    return cut_short(path());
  }
  VMSNAP_CHECK(source_->read_exact(file_length - sizeof trailer_,
                                   std::as_writable_bytes(std::span(&trailer_, 1))));
  if (trailer_.magic != layout::trailer_magic) return cut_short(path());
  if (block_checksum(trailer_) != trailer_.checksum) {
    return damaged(path(), "the checksum of its trailer does not match");
  }
  if (trailer_.version != header_.version || trailer_.id != header_.id) {
    return damaged(path(), "its header and trailer are of different images");
  }
  return {};
}

Status ImageFile::check_trailer(uint64_t file_length) const {
  const layout::Trailer& t = trailer_;
  if (t.file_length != file_length) return cut_short(path());
  if (!all_zero(t.reserved)) return damaged(path(), "its trailer uses reserved bytes");
  if (t.page_count > layout::max_page_count || t.depth != layout::tree_depth(t.page_count)) {
    return damaged(path(), "its trailer gives an impossible page count or depth");
  }
  if (t.zero_pages > t.page_count || t.duplicate_pages > t.page_count - t.zero_pages ||
      t.stored_pages != t.page_count - t.zero_pages - t.duplicate_pages) {
    return damaged(path(), "the counts in its trailer do not add up");
  }
  const uint64_t trailer_begin = file_length - sizeof trailer_;
  if (t.frames_end % layout::frame_alignment != 0 ||
      t.frames_end < layout::frames_begin + sizeof(layout::FrameHeader) ||
      t.frames_end > trailer_begin) {
    return damaged(path(), "its page frames end in an impossible place");
  }
  const uint64_t tree_begin = layout::align_up(t.frames_end, layout::block_size);
  const bool no_root = t.root.offset == 0 && t.root.checksum == 0;
  if (!no_root && (t.root.offset % layout::block_size != 0 || t.root.offset < tree_begin ||
                   t.root.offset >= trailer_begin)) {
    return damaged(path(), "the root of its page tree is in an impossible place");
  }
  return {};
}

Status ImageFile::check_sections() const {
  const uint64_t begin = tree_shape().end;
  const uint64_t end = trailer_.file_length - sizeof trailer_;
  uint32_t seen = 0;
  for (const layout::Section& s : trailer_.sections) {
    if (s.type == static_cast<uint32_t>(layout::SectionType::none)) {
      const layout::Section unused = {};
      if (std::memcmp(&s, &unused, sizeof s) != 0) {
        return damaged(path(), "its trailer uses reserved bytes");
      }
      continue;
    }
    if (s.offset % layout::frame_alignment != 0 || s.offset < begin || s.offset > end ||
        s.stored_length > end - s.offset) {
      return damaged(path(), "its {} section is not inside the file", section_name(s.type));
    }
    if (!known(s.type)) {
      if ((s.flags & layout::section_must_understand) == 0) continue;
      return unsupported(path(), fmt::format("has a section (type {}) that this vmsnap needs to "
                                            "understand and does not",
                                            s.type));
    }
    if ((s.flags & ~layout::section_must_understand) != 0 ||
        (s.codec != layout::codec_raw && s.codec != layout::codec_zstd) ||
        (s.codec == layout::codec_raw && s.stored_length != s.raw_length) ||
        s.raw_length > max_raw_length(layout::SectionType(s.type)) ||
        s.stored_length > ZSTD_compressBound(s.raw_length)) {
      return damaged(path(), "its {} section has impossible lengths or flags", section_name(s.type));
    }
    if ((seen & 1u << s.type) != 0)
      return damaged(path(), "it has two {} sections", section_name(s.type));
    seen |= 1u << s.type;
  }
  if (!find_section(layout::SectionType::metadata)) return damaged(path(), "it has no metadata");
  return {};
}

FrameSource ImageFile::own_frames() const {
  return {.fd = frames_fd_,
          .name = path(),
          .seed = image_seed(),
          .end = trailer_.frames_end - sizeof(layout::FrameHeader),
          .bytes = frames_fd_ < 0 ? source_.get() : nullptr,
          .opening = opening_};
}

PageTree::Shape ImageFile::tree_shape() const {
  const uint64_t begin = layout::align_up(trailer_.frames_end, layout::block_size);
  const layout::Reference root = trailer_.root;
  return {.image_seed = image_seed(),
          .page_count = trailer_.page_count,
          .depth = trailer_.depth,
          .root = root,
          .begin = begin,
          .end = root.offset == 0 ? trailer_.frames_end : root.offset + layout::block_size};
}

const layout::Section* ImageFile::find_section(layout::SectionType type) const {
  const auto found =
      std::ranges::find(trailer_.sections, static_cast<uint32_t>(type), &layout::Section::type);
  return found == trailer_.sections.end() ? nullptr : &*found;
}

Result<std::vector<std::byte>> ImageFile::read_section(layout::SectionType type) const {
  const layout::Section* section = find_section(type);
  if (!section) return std::vector<std::byte>();
  std::vector<std::byte> stored(section->stored_length);
  VMSNAP_CHECK(source_->read_exact(section->offset, stored));
  if (checksum(stored, layout::seed_at(image_seed(), section->offset)) != section->checksum) {
    return damaged(path(), "the checksum of its {} section does not match",
                   section_name(section->type));
  }
  if (section->codec == layout::codec_raw) return stored;
  std::vector<std::byte> raw(section->raw_length);
  const size_t got = ZSTD_decompress(raw.data(), raw.size(), stored.data(), stored.size());
  if (ZSTD_isError(got) || got != raw.size()) {
    return damaged(path(), "its {} section does not decompress", section_name(section->type));
  }
  return raw;
}

Result<std::vector<layout::PackRow>> ImageFile::read_packs() const {
  const auto bytes = VMSNAP_TRY(read_section(layout::SectionType::packs));
  std::vector<layout::PackRow> rows(bytes.size() / sizeof(layout::PackRow));
  if (bytes.size() % sizeof(layout::PackRow) != 0) {
    return damaged(path(), "its packs section is not made of whole rows");
  }
  if (!rows.empty()) std::memcpy(rows.data(), bytes.data(), bytes.size());
  return rows;
}

Result<std::vector<uint64_t>> ImageFile::read_working_set() const {
  const auto bytes = VMSNAP_TRY(read_section(layout::SectionType::working_set));
  std::vector<uint64_t> pages(bytes.size() / sizeof(uint64_t));
  if (!pages.empty()) std::memcpy(pages.data(), bytes.data(), pages.size() * sizeof(uint64_t));
  if (bytes.size() % sizeof(uint64_t) != 0 ||
      std::ranges::any_of(pages, [&](uint64_t page) { return page >= trailer_.page_count; })) {
    return damaged(path(), "its working set is not made of its pages");
  }
  return pages;
}

Result<ImageInfo> ImageFile::read_info() const {
  const std::vector<std::byte> json = VMSNAP_TRY(read_section(layout::SectionType::metadata));
  ImageInfo info = VMSNAP_TRY(decode_metadata(json, trailer_.page_count, path()));
  if (info.id != id_text(header_.id)) {
    return damaged(path(), "its metadata is of another image");
  }
  return info;
}

}  // namespace vmsnap
