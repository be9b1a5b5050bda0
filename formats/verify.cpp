#include "formats/verify.h"

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <utility>

#include "formats/checksum.h"
#include "formats/damage.h"
#include "formats/digest.h"
#include "formats/frame_walk.h"
#include "formats/image_file.h"
#include "formats/interrupt.h"

namespace vmsnap {

namespace {

constexpr size_t chunk_size = 1 << 20;

class Verifier {
 public:
  Verifier(const ImageFile& file, const ImageInfo& info, const PageCheck& check,
           const VerifyProgress& progress)
      : file_(file),
        info_(info),
        progress_(progress),
        check_(check),
        tree_(file.source(), file.tree_shape()),
        next_block_(tree_.shape().begin) {
    report_.path = file.path();
    report_.page_count = file.trailer().page_count;
  }

  // `frames_elsewhere`: what the trailer counts is not in this file.
  VerifyReport run(bool frames_elsewhere) {
    check_frames(frames_elsewhere ? 0 : file_.trailer().stored_pages);
    check_tree();
    check_sections();
    check_padding();
    show_progress(100);
    return std::move(report_);
  }

 private:
  void check_frames(uint64_t stored_pages);
  void check_tree();
  void check_block(uint32_t level, uint64_t index, layout::Reference reference);
  void check_leaf(uint64_t first_page, const PageTree::Block& block);
  void check_sections();
  Status check_section(const layout::Section& section);
  Status check_digest();
  void check_padding();
  Status check_zeros(uint64_t begin, uint64_t end);

  void damaged_pages(uint64_t first, uint64_t count, const Error& error);
  void add_range(const Region& region, uint64_t first, uint64_t count, const Error& error);
  void other(const Error& error);
  void other(const Status& status) {
    if (!status) other(status.error());
  }
  void show_progress(int percent);

  // Half of the progress each: the frames front to back, then the pages.
  void show_half(int from, uint64_t done, uint64_t total) {
    show_progress(from + static_cast<int>(total == 0 ? 50 : 50.0 * done / total));
  }

  const ImageFile& file_;
  const ImageInfo& info_;
  const VerifyProgress& progress_;
  const PageCheck& check_;
  const PageTree tree_;
  VerifyReport report_;
  uint64_t next_block_;  // where post-order puts the next tree block
  bool tree_whole_ = true;
  int shown_percent_ = -1;
};

void Verifier::check_frames(uint64_t stored_pages) {
  const uint64_t end = file_.trailer().frames_end;
  const auto walk = walk_frames(
      file_, [&](const Error& error) { other(error); },
      [&](uint64_t offset) { show_half(0, offset, end); });
  if (!walk) return other(walk.error());
  if (walk->pages != stored_pages) {
    other(damage(file_.path(), "it holds {} stored pages, but must hold {}", walk->pages,
                 stored_pages));
  }
}

void Verifier::check_tree() {
  const PageTree::Shape& shape = tree_.shape();
  check_block(shape.depth, 0, shape.root);
  if (!tree_whole_) return;  // the rest would only say so again
  const uint64_t end = shape.root.offset == 0 ? shape.begin : shape.end;
  if (next_block_ != end) {
    other(damage(file_.path(), "its page tree does not fill its place"));
  }
  if (report_.damaged_pages == 0 && report_.zero_pages != file_.trailer().zero_pages) {
    other(damage(file_.path(), "it has {} zero pages, but its trailer says {}", report_.zero_pages,
                 file_.trailer().zero_pages));
  }
}

void Verifier::check_block(uint32_t level, uint64_t index, layout::Reference reference) {
  const uint64_t first = index * layout::pages_per_block(level);
  if (first >= report_.page_count || interrupted()) return;
  const uint64_t count = std::min(layout::pages_per_block(level), report_.page_count - first);
  show_half(50, first, report_.page_count);
  if (reference.offset == 0) {
    report_.zero_pages += count;
    return;
  }
  const auto block = tree_.load(level, index, reference);
  if (!block) {
    tree_whole_ = false;
    damaged_pages(first, count, block.error());
    return;
  }
  if (level == 1) {
    check_leaf(first, **block);
  } else {
    for (uint64_t slot = 0; slot < layout::inner_references; ++slot) {
      check_block(level - 1, index * layout::inner_references + slot, (*block)->reference(slot));
    }
  }
  if (tree_whole_ && reference.offset != next_block_) {
    tree_whole_ = false;
    other(damage(file_.path(), "the page-tree block at byte {} is out of order", reference.offset));
  }
  next_block_ += layout::block_size;
}

void Verifier::check_leaf(uint64_t first_page, const PageTree::Block& block) {
  const uint64_t count = std::min(layout::leaf_entries, report_.page_count - first_page);
  for (uint64_t slot = 0; slot < count; ++slot) {
    const uint64_t entry = block.entry(slot);
    if (entry == 0) {
      ++report_.zero_pages;
      continue;
    }
    const Status checked = check_(entry);
    if (checked) {
      ++report_.data_pages;
    } else {
      damaged_pages(first_page + slot, 1, checked.error());
    }
  }
}

void Verifier::check_sections() {
  for (const layout::Section& section : file_.trailer().sections) {
    if (section.type != 0) other(check_section(section));
  }
  const auto state = file_.read_section(layout::SectionType::device_state);
  if (!state) other(state.error());
  if (const Status digest = check_digest(); !digest) other(digest.error());
}

// What a fast checksum does not tell: whether somebody made it so on purpose,
// and one damage that hits both. Older images have none.
Status Verifier::check_digest() {
  const layout::Section* section = file_.find_section(layout::SectionType::digest);
  if (!section) return {};
  const std::vector<std::byte> stored = VMSNAP_TRY(file_.read_section(layout::SectionType::digest));
  DigestStream stream;
  std::vector<std::byte> chunk;
  for (uint64_t at = file_.trailer().frames_end; at < section->offset; at += chunk.size()) {
    chunk.resize(std::min<uint64_t>(chunk_size, section->offset - at));
    VMSNAP_CHECK(file_.source().read_exact(at, chunk));
    stream.add(chunk);
  }
  const Digest digest = stream.finish();
  if (std::ranges::equal(std::as_bytes(std::span(digest)), stored)) return {};
  return damaged(file_.path(), "the digest of all but its frames does not match");
}

// Also of types that are not known here, which may be of any length.
Status Verifier::check_section(const layout::Section& section) {
  StreamChecksum sum;
  sum.reset(layout::seed_at(file_.image_seed(), section.offset));
  std::vector<std::byte> chunk;
  for (uint64_t done = 0; done < section.stored_length; done += chunk.size()) {
    chunk.resize(std::min<uint64_t>(chunk_size, section.stored_length - done));
    VMSNAP_CHECK(file_.source().read_exact(section.offset + done, chunk));
    sum.add(chunk);
  }
  if (sum.value() == section.checksum) return {};
  return damaged(file_.path(), "the checksum of section type {} does not match", section.type);
}

// What is between the structures: all of it zero, nowhere a block or more, and
// no two structures in one place.
void Verifier::check_padding() {
  const layout::Trailer& trailer = file_.trailer();
  const PageTree::Shape& tree = tree_.shape();
  std::vector<std::pair<uint64_t, uint64_t>> extents = {
      {0, trailer.frames_end},  // walked frame by frame
      {trailer.file_length - sizeof trailer, trailer.file_length}};
  if (tree.root.offset != 0) extents.emplace_back(tree.begin, tree.end);
  for (const layout::Section& section : trailer.sections) {
    if (section.type != 0) {
      extents.emplace_back(section.offset, section.offset + section.stored_length);
    }
  }
  std::ranges::sort(extents);
  for (size_t i = 1; i < extents.size(); ++i) {
    const uint64_t end = extents[i - 1].second;
    const uint64_t begin = extents[i].first;
    if (begin < end || begin - end >= layout::block_size) {
      other(damage(file_.path(), "bytes {} to {} are used twice, or by nothing",
                   std::min(begin, end), std::max(begin, end)));
    } else {
      other(check_zeros(end, begin));
    }
  }
}

Status Verifier::check_zeros(uint64_t begin, uint64_t end) {
  std::array<std::byte, layout::block_size> buffer;
  const auto bytes = std::span(buffer).first(end - begin);
  VMSNAP_CHECK(file_.source().read_exact(begin, bytes));
  if (std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{0}; })) return {};
  return damaged(file_.path(), "the padding at byte {} is not zero", begin);
}

// In terms of regions, which is what the user knows.
void Verifier::damaged_pages(uint64_t first, uint64_t count, const Error& error) {
  report_.damaged_pages += count;
  report_.damage_count += count;
  const uint64_t end = first + count;
  while (first < end) {
    const Region& region = *find_region(info_.regions, first);
    const uint64_t region_end = region.first_page + region.length / page_size;
    add_range(region, first, std::min(end, region_end) - first, error);
    first = region_end;
  }
}

void Verifier::add_range(const Region& region, uint64_t first, uint64_t count, const Error& error) {
  if (!report_.damaged.empty()) {
    DamagedRange& last = report_.damaged.back();
    if (last.first_page + last.page_count == first && first != region.first_page) {
      last.page_count += count;
      return;
    }
  }
  if (report_.damaged.size() == VerifyReport::max_listed) return;
  report_.damaged.push_back({.first_page = first,
                             .page_count = count,
                             .region = region.name,
                             .offset = (first - region.first_page) * page_size,
                             .reason = error.message()});
}

void Verifier::other(const Error& error) {
  ++report_.damage_count;
  if (report_.other_damage.size() < VerifyReport::max_listed) {
    report_.other_damage.push_back(error.message());
  }
}

void Verifier::show_progress(int percent) {
  if (percent == shown_percent_ || !progress_) return;
  shown_percent_ = percent;
  progress_(percent);
}

}  // namespace

Status VerifyReport::status() const {
  if (ok()) return {};
  if (damaged.empty()) {
    return tl::unexpected(Error(ErrorCode::damaged, other_damage.front())
                              .with_remedy("No page is lost: export what you need, and take a "
                                           "new snapshot."));
  }
  const DamagedRange& first = damaged.front();
  return tl::unexpected(
      Error(ErrorCode::damaged,
            fmt::format("{} is damaged: {} of its {} pages cannot be read back, first the one at "
                        "offset {:#x} of region {}",
                        path, damaged_pages, page_count, first.offset, first.region))
          .with_remedy("Use another copy of the image, if there is one."));
}

Result<VerifyReport> verify_image(const std::string& path, const VerifyProgress& progress) {
  const ImageFile file = VMSNAP_TRY(ImageFile::open(path));
  const ImageInfo info = VMSNAP_TRY(file.read_info());
  const OwnFrames frames(file.own_frames(), file.header().id);
  uint64_t last_entry = 0;  // the last one that was read back whole
  const PageCheck read_back = [&](uint64_t entry) -> Status {
    if (entry == last_entry) return {};
    std::array<std::byte, page_size> bytes;
    VMSNAP_CHECK(read_stored_page(frames, entry, bytes));
    last_entry = entry;
    return {};
  };
  VerifyReport report = Verifier(file, info, read_back, progress).run(/*frames_elsewhere=*/false);
  VMSNAP_CHECK(check_interrupted());  // then it tells of what was not looked at, too
  return report;
}

VerifyReport verify_manifest(const ImageFile& file, const ImageInfo& info, const PageCheck& check) {
  const VerifyProgress no_progress;
  return Verifier(file, info, check, no_progress).run(/*frames_elsewhere=*/true);
}

}  // namespace vmsnap
