#include "formats/frame_batch.h"

#include <cstring>

#include "formats/page_entry.h"

namespace vmsnap {

namespace {

constexpr size_t frame_room = layout::align_up(layout::max_frame_bytes(1), layout::frame_alignment);
// A frame that is this small is not worth a base, nor its search.
constexpr size_t small_frame = 192;
// A base costs the reader a second frame: at least a tenth must be saved.
constexpr size_t most_of_alone(size_t alone) { return alone - alone / 10; }

}  // namespace

Result<uint64_t> FrameBatch::write(FrameSink& sink, int level, SimilarPages* similar,
                                   std::span<Page> pages,
                                   const std::function<void()>& before_each) {
  if (pages.empty()) return 0;
  frames_.resize(max_pages * frame_room);
  encoder_.set_level(level);
  similar_ = similar;
  const std::optional<uint64_t> pack = sink.next_pack();
  uint64_t used = VMSNAP_TRY(encode(sink, pack, pages, before_each));
  std::optional<FramePlace> place;
  if (uses_pack_) {
    place = VMSNAP_TRY(sink.reserve_in(*pack, used));
    // The file of the bases is full: without them, then.
    if (!place) used = VMSNAP_TRY(encode(sink, std::nullopt, pages, before_each));
  }
  if (!place) place = VMSNAP_TRY(sink.reserve(used));
  finish(*place, pages);
  VMSNAP_CHECK(sink.write(*place, std::span(frames_).first(used), notes_));
  for (const auto& [k, sketch] : standing_alone_) similar_->add(sketch, pages[k].entry);
  return used;
}

// Bases are in `pack`, if there is one, or in the batch. Returns the bytes used.
Result<uint64_t> FrameBatch::encode(FrameSink& sink, std::optional<uint64_t> pack,
                                    std::span<Page> pages,
                                    const std::function<void()>& before_each) {
  starts_.clear();
  standing_alone_.clear();
  in_batch_.clear();
  uses_pack_ = false;
  uint64_t used = 0;
  for (size_t k = 0; k < pages.size(); ++k) {
    before_each();
    starts_.push_back({.offset = used});
    const auto out = std::span(frames_).subspan(used);
    size_t length = encoder_.encode(pages[k].bytes, sink.sealed(), out);
    if (similar_ && length > small_frame) {
      const size_t delta = VMSNAP_TRY(try_delta(sink, pack, pages, k, length));
      if (delta > 0) std::memcpy(out.data(), delta_.data(), length = delta);
    }
    used += length;
  }
  return used;
}

// The bytes of page k's delta frame in delta_; 0 if it is to stand alone.
Result<size_t> FrameBatch::try_delta(FrameSink& sink, std::optional<uint64_t> pack,
                                     std::span<const Page> pages, size_t k, size_t alone) {
  const Sketch sketch(pages[k].bytes);
  candidates_.clear();
  for (const uint64_t hash : sketch.hashes()) {
    if (const auto found = in_batch_.find(hash); found != in_batch_.end()) {
      candidates_.push_back(found->second);
    }
  }
  if (pack) similar_->find(sketch, *pack, candidates_);
  if (const uint64_t base = most_frequent(candidates_); base != 0) {
    const bool is_in_batch = base <= pages.size();
    if (!is_in_batch) VMSNAP_CHECK(sink.read(base, base_));
    const std::span<const std::byte, page_size> base_page =
        is_in_batch ? pages[base - 1].bytes : std::span<const std::byte, page_size>(base_);
    const size_t length = encoder_.encode_delta(pages[k].bytes, base_page, sink.sealed(),
                                                most_of_alone(alone), delta_);
    if (length > 0) {
      starts_[k].base = base;
      uses_pack_ = uses_pack_ || !is_in_batch;
      return length;
    }
  }
  for (const uint64_t hash : sketch.hashes()) in_batch_.try_emplace(hash, k + 1);
  standing_alone_.emplace_back(k, sketch);
  return 0;
}

void FrameBatch::finish(const FramePlace& place, std::span<Page> pages) {
  notes_.clear();
  for (size_t k = 0; k < pages.size(); ++k) {
    const auto [start, base] = starts_[k];
    const PageEntry entry = {.pack = place.pack, .offset = place.offset + start};
    const auto frame = std::span(frames_).subspan(start);
    if (base != 0) {
      FrameEncoder::set_base(frame, base <= pages.size()
                                        ? place.offset + starts_[base - 1].offset
                                        : PageEntry::from_bits(base).offset);
    }
    encoder_.finish(frame, {entry.offset, place.seed, place.key});
    notes_.push_back({pages[k].hash, entry.offset});
    pages[k].entry = entry.pack_bits();
  }
}

}  // namespace vmsnap
