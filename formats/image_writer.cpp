#include "formats/image_writer.h"

#include <algorithm>
#include <utility>

#include "formats/append_file.h"
#include "formats/file.h"
#include "formats/file_sink.h"
#include "formats/image_file.h"
#include "formats/page_array.h"
#include "formats/page_codec.h"
#include "formats/page_store.h"
#include "formats/test_point.h"

namespace vmsnap {

struct ImageWriter::Encoder::State {
  PageStore::Scratch scratch;
  std::vector<uint64_t> entries;
};

ImageWriter::Encoder::Encoder(std::function<void()> between_pages)
    : state_(std::make_unique<State>()) {
  state_->scratch.between_pages = std::move(between_pages);
}
ImageWriter::Encoder::~Encoder() = default;
ImageWriter::Encoder::Encoder(Encoder&&) noexcept = default;

struct ImageWriter::State {
  std::string name;
  uint64_t page_count = 0;
  int zstd_level = level_alone;
  layout::ImageId id = {};
  int fd = -1;                            // one file for all ...
  std::unique_ptr<FrameSink> own_frames;
  ByteSink* manifest = nullptr;           // ... or one for all but the frames
  FrameSink* frames = nullptr;
  std::unique_ptr<PageStore> store;
  PageArray pages;
  std::atomic<uint64_t> duplicate_pages = 0;
  std::atomic<uint64_t> stored_pages = 0;

  static Result<std::unique_ptr<State>> create(std::string name, uint64_t page_count);
  Status prepare(KnownPages* known, ImageWriterOptions options);
  uint64_t seed() const { return layout::image_seed(id); }
};

ImageWriter::ImageWriter(std::unique_ptr<State> state) : state_(std::move(state)) {}
ImageWriter::~ImageWriter() = default;

Result<std::unique_ptr<ImageWriter::State>> ImageWriter::State::create(std::string name,
                                                                       uint64_t page_count) {
  if (page_count > layout::max_page_count) {
    return fail(ErrorCode::refused, "cannot write {}: an image holds at most 8 PiB", name);
  }
  auto state = std::make_unique<State>();
  state->name = std::move(name);
  state->page_count = page_count;
  state->id = VMSNAP_TRY(random_id());
  return state;
}

Status ImageWriter::State::prepare(KnownPages* known, ImageWriterOptions options) {
  zstd_level = options.zstd_level();
  store = VMSNAP_TRY(PageStore::create(*frames, known, name, std::move(options)));
  pages = VMSNAP_TRY(PageArray::create(page_count));
  return {};
}

Result<std::unique_ptr<ImageWriter>> ImageWriter::create(int fd, std::string name,
                                                         uint64_t page_count,
                                                         ImageWriterOptions options) {
  auto state = VMSNAP_TRY(State::create(std::move(name), page_count));
  state->fd = fd;
  state->own_frames = std::make_unique<FileSink>(fd, state->name, state->seed());
  state->frames = state->own_frames.get();
  const layout::Header header =
      make_header(state->id, options.deltas ? layout::incompatible_deltas : 0);
  VMSNAP_CHECK(state->prepare(nullptr, std::move(options)));
  VMSNAP_CHECK(write_all_at(fd, std::as_bytes(std::span(&header, 1)), 0, state->name));
  return std::unique_ptr<ImageWriter>(new ImageWriter(std::move(state)));
}

Result<std::unique_ptr<ImageWriter>> ImageWriter::create_manifest(ByteSink& manifest,
                                                                  FrameSink& frames,
                                                                  KnownPages* known,
                                                                  std::string name,
                                                                  uint64_t page_count,
                                                                  ImageWriterOptions options) {
  auto state = VMSNAP_TRY(State::create(std::move(name), page_count));
  state->manifest = &manifest;
  state->frames = &frames;
  VMSNAP_CHECK(state->prepare(known, std::move(options)));
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
    const PageCounts counts =
        VMSNAP_TRY(state.store->store(encoder.state_->scratch, numbers.first(count),
                                      data.first(count * page_size), entries));
    for (size_t k = 0; k < count; ++k) state.pages.set(numbers[k], entries[k]);
    total.zero += counts.zero;
    total.duplicate += counts.duplicate;
    total.stored += counts.stored;
    total.bytes += counts.bytes;
    numbers = numbers.subspan(count);
    data = data.subspan(count * page_size);
  }
  state.duplicate_pages += total.duplicate;
  state.stored_pages += total.stored;
  return total;
}

Result<uint64_t> ImageWriter::finish(const ImageInfo& info, std::span<const std::byte> device_state,
                                     std::span<const uint64_t> working_set) {
  State& state = *state_;
  VMSNAP_CHECK(state.store->status());
  ImageTail tail = {.id = state.id,
                    .pages = state.pages,
                    .counts = {.duplicate = state.duplicate_pages, .stored = state.stored_pages},
                    .page_count = state.page_count,
                    .frames_end = VMSNAP_TRY(state.frames->close()),
                    .zstd_level = state.zstd_level};
  const std::vector<std::byte> packs = state.frames->packs_section(state.pages.count_packs());
  const ImageSections sections = {
      .device_state = device_state, .packs = packs, .working_set = working_set};
  const auto write = [&](ByteSink& file) -> Result<uint64_t> {
    const uint64_t length = VMSNAP_TRY(write_tail(file, tail, info, sections, state.name));
    VMSNAP_CHECK(file.finish());
    VMSNAP_TEST_POINT("commit.written");
    return length;
  };
  if (!state.manifest) {
    AppendFile file(state.fd, state.name, tail.frames_end);
    return write(file);
  }
  VMSNAP_CHECK(append_empty_frames(*state.manifest, state.id));
  tail.frames_end = state.manifest->offset();
  return write(*state.manifest);
}

}  // namespace vmsnap
