#include "formats/image_tail.h"

#include <sys/random.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>

#include "formats/checked_block.h"
#include "formats/checksum.h"
#include "formats/digest.h"
#include "formats/image_file.h"
#include "formats/metadata.h"
#include "formats/page_codec.h"

namespace vmsnap {

namespace {

Result<layout::Section> append_section(ByteSink& file, const ImageTail& tail,
                                       layout::SectionType type, std::span<const std::byte> raw,
                                       const std::string& name) {
  // Those that a person reads, or that do not shrink, stay as they are.
  const bool compress = type == layout::SectionType::device_state ||
                        type == layout::SectionType::working_set;
  std::vector<std::byte> compressed;
  std::span<const std::byte> stored = raw;
  if (compress) {
    compressed.resize(ZSTD_compressBound(raw.size()));
    const size_t length = ZSTD_compress(compressed.data(), compressed.size(), raw.data(),
                                        raw.size(), tail.zstd_level);
    if (ZSTD_isError(length)) {
      return fail(ErrorCode::io, "cannot compress for {}: {}", name, ZSTD_getErrorName(length));
    }
    stored = std::span(compressed).first(length);
  }
  VMSNAP_CHECK(file.pad_to(layout::frame_alignment));
  const uint64_t offset = file.offset();
  VMSNAP_CHECK(file.append(stored));
  // Without them an image is still all there.
  const bool needed =
      type != layout::SectionType::working_set && type != layout::SectionType::digest;
  return layout::Section{
      .type = static_cast<uint32_t>(type),
      .codec = compress ? layout::codec_zstd : layout::codec_raw,
      .flags = needed ? layout::section_must_understand : uint16_t{0},
      .offset = offset,
      .stored_length = stored.size(),
      .raw_length = raw.size(),
      .checksum = checksum(stored, layout::seed_at(layout::image_seed(tail.id), offset))};
}

// Whatever is appended goes through, and into a digest.
class DigestingSink : public ByteSink {
 public:
  explicit DigestingSink(ByteSink& file) : file_(file) {}

  Status append(std::span<const std::byte> bytes) override {
    digest_.add(bytes);
    return file_.append(bytes);
  }
  uint64_t offset() const override { return file_.offset(); }
  Status finish() override { return {}; }  // the caller's to do
  Digest digest() { return digest_.finish(); }

 private:
  ByteSink& file_;
  DigestStream digest_;
};

}  // namespace

Result<layout::ImageId> random_id() {
  layout::ImageId id;
  if (::getrandom(id.data(), id.size(), 0) != static_cast<ssize_t>(id.size())) {
    return fail_errno(errno, "cannot get random bytes");
  }
  return id;
}

layout::Header make_header(const layout::ImageId& id, uint64_t incompatible) {
  layout::Header header = {};
  header.magic = layout::header_magic;
  header.version = layout::format_version;
  header.incompatible = incompatible;
  header.id = id;
  header.checksum = block_checksum(header);
  return header;
}

Status append_empty_frames(ByteSink& file, const layout::ImageId& id) {
  const layout::Header header = make_header(id);
  VMSNAP_CHECK(file.append(std::as_bytes(std::span(&header, 1))));
  const layout::FrameHeader mark =
      end_mark({.offset = layout::frames_begin, .seed = layout::image_seed(id)});
  return file.append(std::as_bytes(std::span(&mark, 1)));
}

Result<uint64_t> write_tail(ByteSink& file, const ImageTail& tail, const ImageInfo& info,
                            const ImageSections& sections, const std::string& name) {
  if (sections.device_state.size() > layout::max_device_state) {
    return fail(ErrorCode::refused, "cannot write {}: the device state is larger than 256 MiB",
                name);
  }
  ImageInfo named = info;
  named.id = id_text(tail.id);
  const std::string metadata = VMSNAP_TRY(encode_metadata(named, tail.page_count, name));

  layout::Trailer trailer = {};
  trailer.magic = layout::trailer_magic;
  trailer.version = layout::format_version;
  trailer.depth = layout::tree_depth(tail.page_count);
  trailer.id = tail.id;
  trailer.page_count = tail.page_count;
  trailer.duplicate_pages = tail.counts.duplicate;
  trailer.stored_pages = tail.counts.stored;
  trailer.zero_pages = tail.page_count - trailer.duplicate_pages - trailer.stored_pages;
  trailer.frames_end = tail.frames_end;
  DigestingSink digested(file);
  trailer.root = VMSNAP_TRY(tail.pages.write_tree(digested, layout::image_seed(tail.id)));

  const auto working_set = std::as_bytes(sections.working_set);
  const std::pair<layout::SectionType, std::span<const std::byte>> all[] = {
      {layout::SectionType::device_state, sections.device_state},
      {layout::SectionType::packs, sections.packs},
      {layout::SectionType::working_set,
       working_set.first(std::min<size_t>(working_set.size(), layout::max_working_set))},
      {layout::SectionType::metadata, std::as_bytes(std::span(metadata))}};
  size_t slot = 0;
  for (const auto& [type, bytes] : all) {
    if (bytes.empty()) continue;
    trailer.sections[slot++] = VMSNAP_TRY(append_section(digested, tail, type, bytes, name));
  }
  VMSNAP_CHECK(digested.pad_to(layout::frame_alignment));
  const Digest digest = digested.digest();
  trailer.sections[slot++] = VMSNAP_TRY(append_section(
      file, tail, layout::SectionType::digest, std::as_bytes(std::span(digest)), name));
  VMSNAP_CHECK(file.pad_to(layout::block_size));
  trailer.file_length = file.offset() + sizeof trailer;
  trailer.checksum = block_checksum(trailer);
  VMSNAP_CHECK(file.append(std::as_bytes(std::span(&trailer, 1))));
  return trailer.file_length;
}

}  // namespace vmsnap
