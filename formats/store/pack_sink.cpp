#include "formats/store/pack_sink.h"

#include <fcntl.h>

#include <algorithm>
#include <utility>

#include "formats/append_file.h"
#include "formats/checked_block.h"
#include "formats/image_file.h"
#include "formats/image_tail.h"
#include "formats/page_codec.h"
#include "formats/page_entry.h"
#include "formats/seal.h"
#include "formats/test_point.h"

namespace vmsnap {

struct PackSink::Pack {
  explicit Pack(AtomicFile f) : file(std::move(f)) {}

  AtomicFile file;
  uint64_t number = 0;
  layout::ImageId id = {};
  std::optional<SecretKey> key;
  uint64_t end = layout::frames_begin;  // of the space reserved so far
  int writing = 0;                      // reserved, not yet written
  bool full = false;
  std::vector<layout::PackSegment> segments;
  std::vector<layout::PackFrame> frames;
  uint64_t file_length = 0;  // once ended

};

PackSink::PackSink(StorePaths paths, PackSet& packs, uint64_t pack_bytes, bool deltas,
                   const SecretKey* master)
    : paths_(std::move(paths)),
      packs_(packs),
      pack_bytes_(pack_bytes),
      version_(deltas ? layout::pack_version_deltas : layout::pack_version),
      master_(master) {}

PackSink::~PackSink() = default;

Result<PackSink::Pack*> PackSink::start_pack() {
  const layout::ImageId id = VMSNAP_TRY(random_id());
  auto pack = std::make_unique<Pack>(VMSNAP_TRY(
      AtomicFile::create_in(paths_.temporary(), paths_.pack(id), /*replace=*/false)));
  pack->id = id;
  if (master_) pack->key = master_->derive("pack", id);
  layout::PackHeader header = {};
  header.magic = layout::pack_magic;
  header.version = version_;
  header.flags = master_ ? layout::pack_sealed : 0;
  header.id = id;
  const auto bytes = std::as_bytes(std::span(&header, 1));
  header.checksum = block_checksum(header);
  VMSNAP_CHECK(write_all_at(pack->file.fd(), bytes, 0, pack->file.path()));
  pack->number = VMSNAP_TRY(packs_.add_open(id, pack->file.fd(), pack->file.path(),
                                            pack->key ? &*pack->key : nullptr));
  VMSNAP_TEST_POINT("store.pack_started");
  Pack* started = pack.get();
  all_.emplace(started->number, std::move(pack));
  return started;
}

Result<FramePlace> PackSink::reserve(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  if (!current_) current_ = VMSNAP_TRY(start_pack());
  return reserve_in_current(bytes);
}

std::optional<uint64_t> PackSink::next_pack() const {
  std::lock_guard lock(mutex_);
  return current_ ? std::optional(current_->number) : std::nullopt;
}

Result<std::optional<FramePlace>> PackSink::reserve_in(uint64_t pack, uint64_t bytes) {
  std::lock_guard lock(mutex_);
  if (!current_ || current_->number != pack) return std::nullopt;
  return reserve_in_current(bytes);
}

FramePlace PackSink::reserve_in_current(uint64_t bytes) {
  Pack& pack = *current_;
  const FramePlace place = {.pack = pack.number,
                            .offset = pack.end,
                            .seed = layout::image_seed(pack.id),
                            .key = pack.key ? &*pack.key : nullptr};
  pack.end += bytes;
  ++pack.writing;
  if (pack.end >= pack_bytes_) {
    pack.full = true;
    current_ = nullptr;
  }
  return place;
}

Status PackSink::write(const FramePlace& place, std::span<const std::byte> frames,
                       std::span<const FrameNote> notes) {
  Pack* pack = nullptr;
  {
    std::lock_guard lock(mutex_);
    pack = all_.at(place.pack).get();
  }
  VMSNAP_CHECK(write_all_at(pack->file.fd(), frames, place.offset, pack->file.path()));
  const layout::PackSegment segment = {place.offset, frames.size(), digest(frames)};
  std::lock_guard lock(mutex_);
  pack->segments.push_back(segment);
  for (const FrameNote& note : notes) pack->frames.push_back({note.hash, note.offset});
  --pack->writing;
  if (!pack->full || pack->writing > 0) return {};
  return end_pack(*pack);
}

Status PackSink::read(uint64_t entry, std::span<std::byte, page_size> out) const {
  return read_stored_page(packs_, entry, out);
}

// With the lock held, and nothing more to be written to the pack.
Status PackSink::end_pack(Pack& pack) {
  std::ranges::sort(pack.segments, {}, &layout::PackSegment::offset);
  std::ranges::sort(pack.frames, {}, &layout::PackFrame::offset);
  const uint64_t seed = layout::image_seed(pack.id);
  AppendFile file(pack.file.fd(), pack.file.path(), pack.end);
  const layout::FrameHeader mark = end_mark({.offset = pack.end, .seed = seed});
  VMSNAP_CHECK(file.append(std::as_bytes(std::span(&mark, 1))));

  layout::PackTrailer trailer = {};
  trailer.magic = layout::pack_end_magic;
  trailer.version = version_;
  trailer.flags = master_ ? layout::pack_sealed : 0;
  trailer.id = pack.id;
  trailer.frames_end = file.offset();
  trailer.segments_offset = layout::align_up(trailer.frames_end, 8);
  trailer.segment_count = pack.segments.size();
  trailer.table_offset =
      trailer.segments_offset + pack.segments.size() * sizeof(layout::PackSegment);
  trailer.frame_count = pack.frames.size();

  const auto segments = std::as_bytes(std::span(pack.segments));
  const auto frames = std::as_bytes(std::span(pack.frames));
  std::vector<std::byte> tables(segments.begin(), segments.end());
  tables.insert(tables.end(), frames.begin(), frames.end());
  if (pack.key) {
    tables.resize(tables.size() + layout::seal_tag_bytes);
    const auto sealed = std::span(tables).subspan(segments.size());
    seal(*pack.key, trailer.table_offset, {}, sealed.first(frames.size()),
         sealed.last<layout::seal_tag_bytes>());
  }
  const uint64_t trailer_offset =
      layout::align_up(trailer.segments_offset + tables.size(), layout::block_size);
  tables.resize(trailer_offset - trailer.segments_offset);
  trailer.tables_digest = digest(tables);
  trailer.file_length = trailer_offset + sizeof trailer;
  const auto bytes = std::as_bytes(std::span(&trailer, 1));
  trailer.checksum = block_checksum(trailer);
  VMSNAP_CHECK(file.pad_to(8));
  VMSNAP_CHECK(file.append(tables));
  VMSNAP_CHECK(file.append(bytes));
  VMSNAP_CHECK(file.finish());
  // On its way to the disk while the next one is filled; close() waits for it.
  ::sync_file_range(pack.file.fd(), 0, 0, SYNC_FILE_RANGE_WRITE);

  pack.file_length = trailer.file_length;
  const layout::PackRow row = {.id = pack.id,
                               .frames_end = trailer.frames_end,
                               .referenced = trailer.frames_end - layout::frames_begin,
                               .digest = pack_digest(trailer)};
  packs_.set_row(pack.number, row);
  finished_.push_back({.row = row, .frames = std::move(pack.frames)});
  pack.segments = {};
  return {};
}

Result<uint64_t> PackSink::close() {
  std::lock_guard lock(mutex_);
  if (current_) VMSNAP_CHECK(end_pack(*std::exchange(current_, nullptr)));
  VMSNAP_TEST_POINT("store.packs_ended");
  for (auto& [number, pack] : all_) VMSNAP_CHECK(pack->file.sync());
  VMSNAP_TEST_POINT("store.packs_synced");
  return 0;
}

std::vector<std::byte> PackSink::packs_section(const std::vector<uint64_t>& references) const {
  std::vector<std::byte> section;
  for (uint64_t number = 1; number <= packs_.size(); ++number) {
    layout::PackRow row = packs_.row(number);
    row.referenced = number < references.size() ? references[number] : 0;
    const auto bytes = std::as_bytes(std::span(&row, 1));
    section.insert(section.end(), bytes.begin(), bytes.end());
  }
  return section;
}

uint64_t PackSink::bytes() const {
  uint64_t sum = 0;
  for (const auto& [number, pack] : all_) sum += pack->file_length;
  return sum;
}

Status PackSink::publish() {
  for (auto& [number, pack] : all_) {
    VMSNAP_CHECK(pack->file.publish());
    VMSNAP_TEST_POINT("store.pack_renamed");
  }
  return {};
}

}  // namespace vmsnap
