#include "formats/image_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <span>

#include "formats/checksum.h"
#include "formats/damage.h"
#include "formats/metadata.h"

namespace vmsnap {

namespace {

bool all_zero(std::span<const uint8_t> bytes) {
  return std::ranges::all_of(bytes, [](uint8_t byte) { return byte == 0; });
}

// Of a block that ends with its own checksum.
template <class Block>
bool checksum_matches(const Block& block) {
  const auto bytes = std::as_bytes(std::span(&block, 1));
  return checksum(bytes.first(offsetof(Block, checksum)), 0) == block.checksum;
}

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
  return type == layout::SectionType::metadata ? layout::max_metadata : layout::max_device_state;
}

// For errors.
std::string_view section_name(uint32_t type) {
  switch (layout::SectionType(type)) {
    case layout::SectionType::device_state: return "device state";
    case layout::SectionType::metadata: return "metadata";
    case layout::SectionType::none: break;
  }
  return "unknown";
}

bool known(uint32_t type) {
  return type == static_cast<uint32_t>(layout::SectionType::device_state) ||
         type == static_cast<uint32_t>(layout::SectionType::metadata);
}

}  // namespace

std::string id_text(const layout::ImageId& id) {
  std::string text;
  for (const uint8_t byte : id) text += fmt::format("{:02x}", byte);
  return text;
}

Result<ImageFile> ImageFile::open(const std::string& path) {
  ImageFile file;
  file.path_ = path;
  // O_NONBLOCK: opening a FIFO must not wait for its writer.
  file.fd_ = VMSNAP_TRY(open_file(path, O_RDONLY | O_NONBLOCK));
  struct stat status;
  if (::fstat(file.fd(), &status) < 0) return fail_errno(errno, "cannot look at {}", path);
  if (!S_ISREG(status.st_mode)) {
    return tl::unexpected(Error(ErrorCode::damaged, path + " is not a regular file")
                              .with_remedy("Give the file that 'vmsnap snapshot' made."));
  }
  const auto length = static_cast<uint64_t>(status.st_size);
  VMSNAP_CHECK(file.read_header(length));
  VMSNAP_CHECK(file.read_trailer(length));
  VMSNAP_CHECK(file.check_trailer(length));
  VMSNAP_CHECK(file.check_sections());
  return file;
}

Status ImageFile::read_header(uint64_t file_length) {
  const auto bytes = std::as_writable_bytes(std::span(&header_, 1));
  const uint64_t have = std::min<uint64_t>(file_length, sizeof header_);
  VMSNAP_CHECK(read_exact_at(fd(), bytes.first(have), 0, path_));
  if (have < sizeof header_.magic || header_.magic != layout::header_magic) {
    return tl::unexpected(Error(ErrorCode::damaged, path_ + " is not a vmsnap image")
                              .with_remedy("Give the file that 'vmsnap snapshot' made."));
  }
  if (have < sizeof header_) return cut_short(path_);
  if (!checksum_matches(header_))
    return damaged(path_, "the checksum of its header does not match");
  if (header_.version != layout::format_version) {
    return unsupported(path_,
                       fmt::format("has image format version {}, newer than this vmsnap's {}",
                                   header_.version, layout::format_version));
  }
  if ((header_.incompatible & ~layout::known_incompatible) != 0) {
    return unsupported(path_, fmt::format("uses image features that this vmsnap lacks ({:#x})",
                                          header_.incompatible & ~layout::known_incompatible));
  }
  if (header_.reserved0 != 0 || !all_zero(header_.reserved)) {
    return damaged(path_, "its header uses reserved bytes");
  }
  return {};
}

Status ImageFile::read_trailer(uint64_t file_length) {
  if (file_length < sizeof header_ + sizeof trailer_ || file_length % layout::block_size != 0) {
    return cut_short(path_);
  }
  VMSNAP_CHECK(read_exact_at(fd(), std::as_writable_bytes(std::span(&trailer_, 1)),
                             file_length - sizeof trailer_, path_));
  if (trailer_.magic != layout::trailer_magic) return cut_short(path_);
  if (!checksum_matches(trailer_)) {
    return damaged(path_, "the checksum of its trailer does not match");
  }
  if (trailer_.version != header_.version || trailer_.id != header_.id) {
    return damaged(path_, "its header and trailer are of different images");
  }
  return {};
}

Status ImageFile::check_trailer(uint64_t file_length) const {
  const layout::Trailer& t = trailer_;
  if (t.file_length != file_length) return cut_short(path_);
  if (!all_zero(t.reserved)) return damaged(path_, "its trailer uses reserved bytes");
  if (t.page_count > layout::max_page_count || t.depth != layout::tree_depth(t.page_count)) {
    return damaged(path_, "its trailer gives an impossible page count or depth");
  }
  if (t.zero_pages > t.page_count || t.duplicate_pages > t.page_count - t.zero_pages ||
      t.stored_pages != t.page_count - t.zero_pages - t.duplicate_pages) {
    return damaged(path_, "the counts in its trailer do not add up");
  }
  const uint64_t trailer_begin = file_length - sizeof trailer_;
  if (t.frames_end % layout::frame_alignment != 0 ||
      t.frames_end < layout::frames_begin + sizeof(layout::FrameHeader) ||
      t.frames_end > trailer_begin) {
    return damaged(path_, "its page frames end in an impossible place");
  }
  const uint64_t tree_begin = layout::align_up(t.frames_end, layout::block_size);
  const bool no_root = t.root.offset == 0 && t.root.checksum == 0;
  if (!no_root && (t.root.offset % layout::block_size != 0 || t.root.offset < tree_begin ||
                   t.root.offset >= trailer_begin)) {
    return damaged(path_, "the root of its page tree is in an impossible place");
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
        return damaged(path_, "its trailer uses reserved bytes");
      }
      continue;
    }
    if (s.offset % layout::frame_alignment != 0 || s.offset < begin || s.offset > end ||
        s.stored_length > end - s.offset) {
      return damaged(path_, "its {} section is not inside the file", section_name(s.type));
    }
    if (!known(s.type)) {
      if ((s.flags & layout::section_must_understand) == 0) continue;
      return unsupported(path_, fmt::format("has a section (type {}) that this vmsnap needs to "
                                            "understand and does not",
                                            s.type));
    }
    if ((s.flags & ~layout::section_must_understand) != 0 ||
        (s.codec != layout::codec_raw && s.codec != layout::codec_zstd) ||
        (s.codec == layout::codec_raw && s.stored_length != s.raw_length) ||
        s.raw_length > max_raw_length(layout::SectionType(s.type)) ||
        s.stored_length > ZSTD_compressBound(s.raw_length)) {
      return damaged(path_, "its {} section has impossible lengths or flags", section_name(s.type));
    }
    if ((seen & 1u << s.type) != 0)
      return damaged(path_, "it has two {} sections", section_name(s.type));
    seen |= 1u << s.type;
  }
  if (!find_section(layout::SectionType::metadata)) return damaged(path_, "it has no metadata");
  return {};
}

FrameSource ImageFile::frames() const {
  return {fd(), path_, image_seed(), trailer_.frames_end - sizeof(layout::FrameHeader)};
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
  VMSNAP_CHECK(read_exact_at(fd(), stored, section->offset, path_));
  if (checksum(stored, layout::seed_at(image_seed(), section->offset)) != section->checksum) {
    return damaged(path_, "the checksum of its {} section does not match",
                   section_name(section->type));
  }
  if (section->codec == layout::codec_raw) return stored;
  std::vector<std::byte> raw(section->raw_length);
  const size_t got = ZSTD_decompress(raw.data(), raw.size(), stored.data(), stored.size());
  if (ZSTD_isError(got) || got != raw.size()) {
    return damaged(path_, "its {} section does not decompress", section_name(section->type));
  }
  return raw;
}

Result<ImageInfo> ImageFile::read_info() const {
  const std::vector<std::byte> json = VMSNAP_TRY(read_section(layout::SectionType::metadata));
  ImageInfo info = VMSNAP_TRY(decode_metadata(json, trailer_.page_count, path_));
  if (info.id != id_text(header_.id)) {
    return damaged(path_, "its metadata is of another image");
  }
  return info;
}

}  // namespace vmsnap
