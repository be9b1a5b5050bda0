#include "formats/store/pack_check.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "formats/damage.h"
#include "formats/file.h"
#include "formats/image_file.h"
#include "formats/page_codec.h"

namespace vmsnap {

namespace {

class PackChecker {
 public:
  PackChecker(const PackFile& pack, const layout::ImageId& id) : pack_(pack) {
    check_.id = id;
    check_.path = pack.path();
    check_.bytes = pack.length();
    check_.opened = true;
  }

  PackCheck run(bool with_table, std::span<const layout::PackRow> rows);

 private:
  void check_segments(const std::vector<layout::PackSegment>& segments);
  void check_segment(const layout::PackSegment& segment);
  void walk_without_segments(uint64_t end);
  void check_end_mark(uint64_t frames_end);
  void check_padding(const layout::PackTrailer& trailer);

  uint64_t check_frame(uint64_t offset, std::span<const std::byte> bytes);
  void compare_with_table(uint64_t offset);
  uint64_t next_in_table(uint64_t end) const;

  void lost(uint64_t offset);
  void lost_by_table(uint64_t end);
  void found(const Error& error);

  FrameSource file() const { return pack_.frames(pack_.length()); }
  FrameSite site(uint64_t offset) const { return {.offset = offset, .seed = file().seed}; }

  const PackFile& pack_;
  PackCheck check_;
  FrameDecoder decoder_;
  std::vector<std::byte> buffer_;
  bool have_table_ = false;
  std::vector<layout::PackFrame> table_;
  size_t in_table_ = 0;  // the first that no frame was compared with yet
};

PackCheck PackChecker::run(bool with_table, std::span<const layout::PackRow> rows) {
  const auto trailer = pack_.trailer();
  std::vector<layout::PackSegment> segments;
  if (trailer) {
    check_.digest = pack_digest(*trailer);
    check_.frames_end = trailer->frames_end;
    auto table = with_table ? pack_.frame_table(*trailer) : Result<decltype(table_)>();
    if (with_table && table && std::ranges::adjacent_find(*table, std::greater_equal(),
                                                          &layout::PackFrame::offset) !=
                                   table->end()) {
      found(damage(pack_.path(), "its frame table is not in the order of the file"));
    } else if (with_table && table) {
      have_table_ = true;
      table_ = std::move(*table);
    } else if (!table) {
      found(table.error());
    }
    auto read = pack_.segments(*trailer);
    if (read) {
      segments = std::move(*read);
    } else if (table || !with_table) {  // else it was said already
      found(read.error());
    }
    check_padding(*trailer);
  } else {
    found(trailer.error());
  }

  if (!segments.empty()) {
    check_segments(segments);
    if (have_table_) compare_with_table(trailer->frames_end);
    if (check_.lost_count == 0 && check_.frames != trailer->frame_count) {
      found(damage(pack_.path(), "it holds {} page frames, but its trailer says {}", check_.frames,
                   trailer->frame_count));
    }
  } else {
    uint64_t frames_end = check_.frames_end;
    if (!trailer) {
      for (const layout::PackRow& row : rows) frames_end = std::max(frames_end, row.frames_end);
    }
    walk_without_segments(std::min(frames_end, pack_.length()));
  }
  if (trailer) check_end_mark(trailer->frames_end);

  const auto same = [&](const layout::PackRow& row) {
    return row.digest == check_.digest && row.frames_end == check_.frames_end;
  };
  if (check_.digest && !rows.empty() && std::ranges::none_of(rows, same)) {
    found(damage(pack_.path(), "it is not the pack that snapshots refer to, but another one with "
                               "its id"));
  }
  return std::move(check_);
}

void PackChecker::check_segments(const std::vector<layout::PackSegment>& segments) {
  for (const layout::PackSegment& segment : segments) check_segment(segment);
}

void PackChecker::check_segment(const layout::PackSegment& segment) {
  const uint64_t end = segment.offset + segment.length;
  buffer_.resize(segment.length);
  const Status read = read_exact_at(file().fd, buffer_, segment.offset, pack_.path());
  if (!read) {
    found(read.error());
    return lost_by_table(end);
  }
  const bool as_written = digest(buffer_) == segment.digest;
  const uint64_t lost_before = check_.lost_count;
  const uint64_t frames_before = check_.frames;
  uint64_t offset = segment.offset;
  while (offset < end) {
    if (have_table_) compare_with_table(offset);
    ++check_.frames;
    const uint64_t used = check_frame(offset, std::span(buffer_).subspan(offset - segment.offset));
    // What comes behind a frame of unknown length is found by the table only.
    offset = used != 0 ? offset + used : have_table_ ? next_in_table(end) : end;
  }
  if (as_written) return;
  found(damage(pack_.path(), "the digest of bytes {} to {} does not match", segment.offset, end));
  if (check_.lost_count == lost_before) {
    check_.doubtful.emplace_back(segment.offset, end);
    check_.lost_count += check_.frames - frames_before;
  }
}

// As far as one frame leads to the next.
void PackChecker::walk_without_segments(uint64_t frames_end) {
  const uint64_t end = frames_end - std::min(frames_end, sizeof(layout::FrameHeader));
  uint64_t offset = layout::frames_begin;
  while (offset < end) {
    buffer_.resize(
        std::min<uint64_t>(layout::max_frame_bytes(layout::max_frame_pages) + layout::frame_alignment,
                           end - offset));
    const Status read = read_exact_at(file().fd, buffer_, offset, pack_.path());
    if (!read) return found(read.error());
    ++check_.frames;
    const uint64_t used = check_frame(offset, buffer_);
    if (used == 0) return;
    offset += used;
  }
}

// Its length in the file, 0 if its header does not tell. `bytes` are those from
// its beginning as far as frames can reach.
uint64_t PackChecker::check_frame(uint64_t offset, std::span<const std::byte> bytes) {
  layout::FrameHeader header;
  size_t used = 0;
  size_t aligned = 0;
  if (bytes.size() >= sizeof header) {
    std::memcpy(&header, bytes.data(), sizeof header);
    used = sizeof header + header.stored_length;
    aligned = layout::align_up(used, layout::frame_alignment);
  }
  if (used == 0 || !FrameDecoder::plausible(header, pack_.sealed()) || aligned > bytes.size()) {
    found(damage(pack_.path(), "there is no page frame at byte {}, where one must be", offset));
    lost(offset);
    return 0;
  }
  if (header.codec == layout::codec_delta && !pack_.may_have_deltas()) {
    found(damage(pack_.path(), "the page frame at byte {} is a delta, in a pack of version 1", offset));
  }
  const auto payload = bytes.subspan(sizeof header, header.stored_length);
  if (!decoder_.intact(header, payload, site(offset))) {
    found(damage(pack_.path(), "the checksum of the page frame at byte {} does not match", offset));
    lost(offset);
    // Its length may be what is wrong.
    return have_table_ ? 0 : aligned;
  }
  if (std::ranges::any_of(bytes.subspan(used, aligned - used),
                          [](std::byte b) { return b != std::byte{0}; })) {
    found(damage(pack_.path(), "the padding after the page frame at byte {} is not zero", offset));
  }
  return aligned;
}

// A frame, or the end of them, is at `offset`; so the table has none before it
// that was not met, and has this one.
void PackChecker::compare_with_table(uint64_t offset) {
  for (; in_table_ < table_.size() && table_[in_table_].offset < offset; ++in_table_) {
    found(damage(pack_.path(), "its frame table has a frame at byte {}, where none begins",
                 table_[in_table_].offset));
  }
  if (in_table_ < table_.size() && table_[in_table_].offset == offset) {
    ++in_table_;
  } else if (offset != check_.frames_end) {
    found(damage(pack_.path(), "its frame table lacks the frame at byte {}", offset));
  }
}

uint64_t PackChecker::next_in_table(uint64_t end) const {
  return in_table_ < table_.size() ? std::min(end, table_[in_table_].offset) : end;
}

void PackChecker::check_end_mark(uint64_t frames_end) {
  layout::FrameHeader mark;
  const uint64_t offset = frames_end - sizeof mark;
  const Status read =
      read_exact_at(file().fd, std::as_writable_bytes(std::span(&mark, 1)), offset, pack_.path());
  if (!read) return found(read.error());
  const layout::FrameHeader expected = end_mark(site(offset));
  if (std::memcmp(&mark, &expected, sizeof mark) != 0) {
    found(damage(pack_.path(), "the end mark of its page frames, at byte {}, is wrong", offset));
  }
}

void PackChecker::check_padding(const layout::PackTrailer& trailer) {
  const auto zeros = [&](uint64_t begin, uint64_t end) {
    std::array<std::byte, layout::block_size> block;
    const auto bytes = std::span(block).first(end - begin);
    const Status read = read_exact_at(file().fd, bytes, begin, pack_.path());
    if (!read) return found(read.error());
    if (std::ranges::any_of(bytes, [](std::byte b) { return b != std::byte{0}; })) {
      found(damage(pack_.path(), "the padding at byte {} is not zero", begin));
    }
  };
  const uint64_t tag = pack_.sealed() ? layout::seal_tag_bytes : 0;
  zeros(trailer.frames_end, trailer.segments_offset);
  zeros(trailer.table_offset + trailer.frame_count * sizeof(layout::PackFrame) + tag,
        trailer.file_length - sizeof trailer);
}

void PackChecker::lost(uint64_t offset) {
  ++check_.lost_count;
  if (check_.lost_frames.size() < PackCheck::max_listed) check_.lost_frames.push_back(offset);
}

void PackChecker::lost_by_table(uint64_t end) {
  for (; in_table_ < table_.size() && table_[in_table_].offset < end; ++in_table_) {
    lost(table_[in_table_].offset);
  }
}

void PackChecker::found(const Error& error) {
  ++check_.damage_count;
  if (check_.reasons.size() < PackCheck::max_listed) check_.reasons.push_back(error.message());
}

PackCheck unusable(const layout::ImageId& id, std::string path, const Error& error) {
  PackCheck check;
  check.id = id;
  check.path = std::move(path);
  check.damage_count = 1;
  check.reasons.push_back(error.message());
  return check;
}

}  // namespace

bool PackCheck::doubts(uint64_t offset) const {
  return std::ranges::any_of(
      doubtful, [&](const auto& range) { return offset >= range.first && offset < range.second; });
}

PackCheck check_open_pack(const PackFile& pack, const layout::ImageId& id, bool with_table,
                          std::span<const layout::PackRow> rows) {
  return PackChecker(pack, id).run(with_table, rows);
}

Result<PackCheck> check_pack(const StorePaths& paths, const layout::ImageId& id,
                             const SecretKey* master, std::span<const layout::PackRow> rows) {
  const auto pack = open_pack(paths, id, master);
  if (!pack) {
    if (!says_damage(pack.error())) return tl::unexpected(pack.error());
    return unusable(id, paths.find_pack(id).value_or(""), pack.error());
  }
  return check_open_pack(**pack, id, !(*pack)->sealed() || master, rows);
}

}  // namespace vmsnap
