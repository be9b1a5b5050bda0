#include "formats/image_reader.h"

#include <algorithm>
#include <utility>

#include "formats/image_file.h"
#include "formats/page_entry.h"

namespace vmsnap {

struct ImageReader::State {
  ImageFile file;
  std::unique_ptr<FrameFiles> frames;
  PageTree tree;
  ImageInfo info;
  ImageSummary summary;

  Status check_page(uint64_t page) const {
    if (page < summary.page_count) return {};
    return fail(ErrorCode::io, "{} has no page {}: it has {} pages", file.path(), page,
                summary.page_count);
  }
};

ImageReader::ImageReader(std::unique_ptr<State> state) : state_(std::move(state)) {}
ImageReader::~ImageReader() = default;

Result<std::unique_ptr<ImageReader>> ImageReader::open(const std::string& path) {
  ImageFile file = VMSNAP_TRY(ImageFile::open(path));
  auto frames = std::make_unique<OwnFrames>(file.own_frames(), file.header().id);
  return open(std::move(file), std::move(frames));
}

Result<std::unique_ptr<ImageReader>> ImageReader::open(std::shared_ptr<const SealedSource> source) {
  ImageFile file = VMSNAP_TRY(ImageFile::open(std::move(source)));
  VMSNAP_CHECK(file.check_own_frames());
  auto frames = std::make_unique<OwnFrames>(file.own_frames(), file.header().id);
  return open(std::move(file), std::move(frames));
}

Result<std::unique_ptr<ImageReader>> ImageReader::open(ImageFile file,
                                                       std::unique_ptr<FrameFiles> frames) {
  ImageInfo info = VMSNAP_TRY(file.read_info());
  const layout::Trailer& trailer = file.trailer();
  const layout::Section* state_section = file.find_section(layout::SectionType::device_state);
  const ImageSummary summary = {
      .format_version = file.header().version,
      .file_bytes = trailer.file_length,
      .page_count = trailer.page_count,
      .zero_pages = trailer.zero_pages,
      .duplicate_pages = trailer.duplicate_pages,
      .stored_pages = trailer.stored_pages,
      .device_state_bytes = state_section ? state_section->raw_length : 0,
  };
  const ByteSource& source = file.source();  // stays where it is when the file is moved
  const PageTree::Shape shape = file.tree_shape();
  std::unique_ptr<State> state(new State{.file = std::move(file),
                                         .frames = std::move(frames),
                                         .tree = PageTree(source, shape),
                                         .info = std::move(info),
                                         .summary = summary});
  return std::unique_ptr<ImageReader>(new ImageReader(std::move(state)));
}

const ImageInfo& ImageReader::info() const { return state_->info; }
const ImageSummary& ImageReader::summary() const { return state_->summary; }
const std::string& ImageReader::path() const { return state_->file.path(); }

Result<PageKind> ImageReader::read_page(uint64_t page, std::span<std::byte, page_size> out) const {
  VMSNAP_CHECK(state_->check_page(page));
  const uint64_t entry = VMSNAP_TRY(state_->tree.entry(page));
  if (entry == 0) {
    std::ranges::fill(out, std::byte{0});
    return PageKind::zero;
  }
  VMSNAP_CHECK(read_stored_page(*state_->frames, entry, out));
  return PageKind::data;
}

Result<PageKind> ImageReader::page_kind(uint64_t page) const {
  VMSNAP_CHECK(state_->check_page(page));
  return VMSNAP_TRY(state_->tree.entry(page)) == 0 ? PageKind::zero : PageKind::data;
}

Result<uint64_t> ImageReader::next_data_page(uint64_t page) const {
  return state_->tree.next_data_page(page);
}

Result<uint64_t> ImageReader::entry(uint64_t page) const {
  VMSNAP_CHECK(state_->check_page(page));
  return state_->tree.entry(page);
}

Result<PageLocation> ImageReader::location(uint64_t page) const {
  const uint64_t bits = VMSNAP_TRY(entry(page));
  if (bits == 0) return PageLocation();
  const PageEntry entry = PageEntry::from_bits(bits);
  return PageLocation{VMSNAP_TRY(state_->frames->file_id(entry.pack)), entry.offset, entry.slot};
}

Result<std::vector<uint64_t>> ImageReader::working_set() const {
  return state_->file.read_working_set();
}

Result<std::vector<std::byte>> ImageReader::device_state() const {
  return state_->file.read_section(layout::SectionType::device_state);
}

}  // namespace vmsnap
