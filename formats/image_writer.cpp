#include "formats/image_writer.h"

#include <sys/random.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "formats/append_file.h"
#include "formats/checksum.h"
#include "formats/file.h"
#include "formats/image_file.h"
#include "formats/metadata.h"
#include "formats/page_array.h"
#include "formats/page_store.h"
#include "formats/test_point.h"

namespace vmsnap {

namespace {

// Fills in the checksum of a block that ends with it, and returns its bytes.
template <class Block>
std::span<const std::byte> sealed(Block& block) {
  const auto bytes = std::as_bytes(std::span(&block, 1));
  block.checksum = checksum(bytes.first(offsetof(Block, checksum)), 0);
  return bytes;
}

}  // namespace

struct ImageWriter::Encoder::State {
  PageStore::Scratch scratch;
  std::vector<uint64_t> entries;
};

ImageWriter::Encoder::Encoder() : state_(std::make_unique<State>()) {}
ImageWriter::Encoder::~Encoder() = default;
ImageWriter::Encoder::Encoder(Encoder&&) noexcept = default;

struct ImageWriter::State {
  struct AtomicCounts {
    std::atomic<uint64_t> duplicate = 0;
    std::atomic<uint64_t> stored = 0;
  };

  int fd = -1;
  std::string name;
  uint64_t page_count = 0;
  int compression_level = 1;
  layout::ImageId id = {};
  std::unique_ptr<PageStore> store;
  PageArray pages;
  AtomicCounts counts;

  uint64_t image_seed() const { return layout::image_seed(id); }

  Status write_header() const {
    layout::Header header = {};
    header.magic = layout::header_magic;
    header.version = layout::format_version;
    header.id = id;
    return write_all_at(fd, sealed(header), 0, name);
  }

  Result<layout::Section> append_section(AppendFile& file, layout::SectionType type,
                                         std::span<const std::byte> raw, uint16_t codec) const;
};

ImageWriter::ImageWriter(std::unique_ptr<State> state) : state_(std::move(state)) {}
ImageWriter::~ImageWriter() = default;

Result<std::unique_ptr<ImageWriter>> ImageWriter::create(int fd, std::string name,
                                                         uint64_t page_count,
                                                         ImageWriterOptions options) {
  if (page_count > layout::max_page_count) {
    return fail(ErrorCode::refused, "cannot write {}: an image holds at most 8 PiB", name);
  }
  auto state = std::make_unique<State>();
  state->fd = fd;
  state->name = name;
  state->page_count = page_count;
  state->compression_level = options.compression_level;
  if (::getrandom(state->id.data(), state->id.size(), 0) !=
      static_cast<ssize_t>(state->id.size())) {
    return fail_errno(errno, "cannot get random bytes");
  }
  state->store =
      VMSNAP_TRY(PageStore::create(fd, std::move(name), state->image_seed(), std::move(options)));
  state->pages = VMSNAP_TRY(PageArray::create(page_count));
  VMSNAP_CHECK(state->write_header());
  return std::unique_ptr<ImageWriter>(new ImageWriter(std::move(state)));
}

std::string ImageWriter::id() const { return id_text(state_->id); }

Result<PageCounts> ImageWriter::write_pages(Encoder& encoder, std::span<const uint64_t> numbers,
                                            std::span<const std::byte> data) {
  State& state = *state_;
  if (data.size() != numbers.size() * page_size ||
      std::ranges::any_of(numbers, [&](uint64_t page) { return page >= state.page_count; })) {
    return fail(ErrorCode::io, "cannot write {}: a page number or a length is out of range",
                state.name);
  }
  PageCounts total;
  std::vector<uint64_t>& entries = encoder.state_->entries;
  while (!numbers.empty()) {
    const size_t count = std::min(numbers.size(), PageStore::max_batch);
    entries.resize(count);
    const PageCounts counts = VMSNAP_TRY(
        state.store->store(encoder.state_->scratch, data.first(count * page_size), entries));
    for (size_t k = 0; k < count; ++k) state.pages.set(numbers[k], entries[k]);
    total.zero += counts.zero;
    total.duplicate += counts.duplicate;
    total.stored += counts.stored;
    numbers = numbers.subspan(count);
    data = data.subspan(count * page_size);
  }
  state.counts.duplicate += total.duplicate;
  state.counts.stored += total.stored;
  return total;
}

Result<layout::Section> ImageWriter::State::append_section(AppendFile& file,
                                                           layout::SectionType type,
                                                           std::span<const std::byte> raw,
                                                           uint16_t codec) const {
  std::vector<std::byte> compressed;
  std::span<const std::byte> stored = raw;
  if (codec == layout::codec_zstd) {
    compressed.resize(ZSTD_compressBound(raw.size()));
    const size_t length = ZSTD_compress(compressed.data(), compressed.size(), raw.data(),
                                        raw.size(), compression_level);
    if (ZSTD_isError(length)) {
      return fail(ErrorCode::io, "cannot compress for {}: {}", name, ZSTD_getErrorName(length));
    }
    stored = std::span(compressed).first(length);
  }
  VMSNAP_CHECK(file.pad_to(layout::frame_alignment));
  const uint64_t offset = file.offset();
  VMSNAP_CHECK(file.append(stored));
  return layout::Section{.type = static_cast<uint32_t>(type),
                         .codec = codec,
                         .flags = layout::section_must_understand,
                         .offset = offset,
                         .stored_length = stored.size(),
                         .raw_length = raw.size(),
                         .checksum = checksum(stored, layout::seed_at(image_seed(), offset))};
}

Result<uint64_t> ImageWriter::finish(const ImageInfo& info,
                                     std::span<const std::byte> device_state) {
  State& state = *state_;
  if (device_state.size() > layout::max_device_state) {
    return fail(ErrorCode::refused, "cannot write {}: the device state is larger than 256 MiB",
                state.name);
  }
  ImageInfo named = info;
  named.id = id();
  const std::string metadata = VMSNAP_TRY(encode_metadata(named, state.page_count, state.name));

  layout::Trailer trailer = {};
  trailer.magic = layout::trailer_magic;
  trailer.version = layout::format_version;
  trailer.depth = layout::tree_depth(state.page_count);
  trailer.id = state.id;
  trailer.page_count = state.page_count;
  trailer.duplicate_pages = state.counts.duplicate;
  trailer.stored_pages = state.counts.stored;
  trailer.zero_pages = state.page_count - trailer.duplicate_pages - trailer.stored_pages;
  trailer.frames_end = VMSNAP_TRY(state.store->close());

  AppendFile file(state.fd, state.name, trailer.frames_end);
  trailer.root = VMSNAP_TRY(state.pages.write_tree(file, state.image_seed()));
  size_t slot = 0;
  if (!device_state.empty()) {
    trailer.sections[slot++] = VMSNAP_TRY(state.append_section(
        file, layout::SectionType::device_state, device_state, layout::codec_zstd));
  }
  trailer.sections[slot++] = VMSNAP_TRY(state.append_section(
      file, layout::SectionType::metadata, std::as_bytes(std::span(metadata)), layout::codec_raw));
  VMSNAP_CHECK(file.pad_to(layout::block_size));
  trailer.file_length = file.offset() + sizeof trailer;
  VMSNAP_CHECK(file.append(sealed(trailer)));
  VMSNAP_CHECK(file.flush());
  VMSNAP_TEST_POINT("commit.written");
  return trailer.file_length;
}

}  // namespace vmsnap
