#include "formats/store/pack_file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "formats/checked_block.h"
#include "formats/damage.h"
#include "formats/image_file.h"
#include "formats/seal.h"

namespace vmsnap {

Result<std::unique_ptr<PackFile>> PackFile::open(const std::string& path, const layout::ImageId& id,
                                                 const SecretKey* master) {
  std::unique_ptr<PackFile> pack(new PackFile());
  pack->fd_ = VMSNAP_TRY(open_file(path, O_RDONLY | O_NONBLOCK));
  pack->path_ = path;
  pack->id_ = id;
  struct stat status;
  if (::fstat(pack->fd_.get(), &status) < 0) return fail_errno(errno, "cannot look at {}", path);
  pack->length_ = static_cast<uint64_t>(status.st_size);
  layout::PackHeader header;
  if (!S_ISREG(status.st_mode) || pack->length_ < 2 * layout::block_size) {
    return damaged(path, "it is not a whole pack");
  }
  VMSNAP_CHECK(read_exact_at(pack->fd_.get(), std::as_writable_bytes(std::span(&header, 1)), 0, path));
  if (header.magic != layout::pack_magic) return damaged(path, "it does not begin as a pack does");
  if (block_checksum(header) != header.checksum) return damaged(path, "the checksum of its header does not match");
  if (header.version != layout::pack_version && header.version != layout::pack_version_deltas) {
    return fail(ErrorCode::unsupported, "{} has pack format version {}, newer than this vmsnap's {}",
                path, header.version, layout::pack_version_deltas);
  }
  if ((header.flags & ~layout::pack_sealed) != 0 || !all_zero(header.reserved)) {
    return damaged(path, "its header uses reserved bytes");
  }
  if (header.id != id) return damaged(path, "it is another pack than its name says");
  pack->version_ = header.version;
  pack->sealed_ = header.flags & layout::pack_sealed;
  if (master && !pack->sealed_) {
    // Whoever put it there does not have the key.
    return damaged(path, "it is not sealed, in a store that is");
  }
  if (pack->sealed_ && master) pack->key_ = master->derive("pack", id);
  return pack;
}

FrameSource PackFile::frames(uint64_t end) const {
  return {.fd = fd_.get(),
          .name = path_,
          .seed = layout::image_seed(id_),
          .end = std::min(end, length_),
          .key = key_ ? &*key_ : nullptr,
          .opening = opening_};
}

Result<layout::PackTrailer> PackFile::trailer() const {
  layout::PackTrailer t;
  const uint64_t begin = length_ - sizeof t;
  VMSNAP_CHECK(read_exact_at(fd_.get(), std::as_writable_bytes(std::span(&t, 1)), begin, path_));
  if (t.magic != layout::pack_end_magic) return damaged(path_, "it does not end as a pack does");
  if (block_checksum(t) != t.checksum) return damaged(path_, "the checksum of its trailer does not match");
  const uint64_t tag = sealed_ ? layout::seal_tag_bytes : 0;
  if (t.version != version_ || t.id != id_ || t.file_length != length_ ||
      t.flags != (sealed_ ? layout::pack_sealed : 0) || !all_zero(t.reserved)) {
    return damaged(path_, "its trailer is not of this pack");
  }
  if (t.frames_end < layout::frames_begin + sizeof(layout::FrameHeader) || t.frames_end > begin ||
      t.segment_count > layout::max_pack_segments || t.frame_count > layout::max_pack_frames ||
      t.segments_offset != layout::align_up(t.frames_end, 8) ||
      t.table_offset != t.segments_offset + t.segment_count * sizeof(layout::PackSegment) ||
      layout::align_up(t.table_offset + t.frame_count * sizeof(layout::PackFrame) + tag,
                       layout::block_size) != begin) {
    return damaged(path_, "its trailer gives impossible places");
  }
  return t;
}

namespace {

// What a pack's tables are checked by: all of the bytes between frames and trailer.
Result<std::vector<std::byte>> read_tables(int fd, const std::string& path,
                                           const layout::PackTrailer& t) {
  std::vector<std::byte> bytes(t.file_length - sizeof t - t.segments_offset);
  VMSNAP_CHECK(read_exact_at(fd, bytes, t.segments_offset, path));
  if (digest(bytes) != t.tables_digest) {
    return damaged(path, "the digest of its tables does not match");
  }
  return bytes;
}

}  // namespace

Result<std::vector<layout::PackSegment>> PackFile::segments(const layout::PackTrailer& t) const {
  const auto bytes = VMSNAP_TRY(read_tables(fd_.get(), path_, t));
  std::vector<layout::PackSegment> segments(t.segment_count);
  if (!segments.empty()) {
    std::memcpy(segments.data(), bytes.data(), segments.size() * sizeof(layout::PackSegment));
  }
  uint64_t expected = layout::frames_begin;
  for (const layout::PackSegment& segment : segments) {
    if (segment.offset != expected || segment.length == 0 ||
        segment.length > layout::max_segment) {
      return damaged(path_, "its segments do not follow each other");
    }
    expected += segment.length;
  }
  if (expected + sizeof(layout::FrameHeader) != t.frames_end) {
    return damaged(path_, "its segments do not reach its end mark");
  }
  return segments;
}

Result<std::vector<layout::PackFrame>> PackFile::frame_table(const layout::PackTrailer& t) const {
  const auto bytes = VMSNAP_TRY(read_tables(fd_.get(), path_, t));
  std::vector<layout::PackFrame> table(t.frame_count);
  const auto stored = std::span(bytes).subspan(t.table_offset - t.segments_offset);
  const auto plain = std::as_writable_bytes(std::span(table));
  std::ranges::copy(stored.first(plain.size()), plain.begin());
  if (sealed_) {
    if (!key_) return fail(ErrorCode::wrong_key, "{} is sealed, and no key was given", path_);
    const auto tag = stored.subspan(plain.size()).first<layout::seal_tag_bytes>();
    if (!unseal(*key_, t.table_offset, {}, plain, tag)) {
      return damaged(path_, "its frame table was not sealed with this store's key");
    }
  }
  return table;
}

Result<std::unique_ptr<PackFile>> open_pack(const StorePaths& paths, const layout::ImageId& id,
                                            const SecretKey* master) {
  // It may be renamed between being found and being opened; who renames does so
  // a few times at most in the life of a pack.
  for (int attempt = 0;; ++attempt) {
    auto pack = PackFile::open(VMSNAP_TRY(paths.find_pack(id)), id, master);
    if (pack || pack.error().os_errno() != ENOENT || attempt == 10) return pack;
  }
}

Digest pack_digest(const layout::PackTrailer& trailer) {
  return digest(std::as_bytes(std::span(&trailer, 1)));
}

bool parse_id(std::string_view text, layout::ImageId& id) {
  if (text.size() != 2 * id.size()) return false;
  for (size_t i = 0; i < id.size(); ++i) {
    unsigned byte = 0;
    for (const char c : text.substr(2 * i, 2)) {
      const bool digit = c >= '0' && c <= '9';
      if (!digit && (c < 'a' || c > 'f')) return false;
      byte = byte * 16 + static_cast<unsigned>(digit ? c - '0' : c - 'a' + 10);
    }
    id[i] = static_cast<uint8_t>(byte);
  }
  return true;
}

}  // namespace vmsnap
