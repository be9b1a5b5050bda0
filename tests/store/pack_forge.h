// Makes checksums and digests right again in a pack that was changed on
// purpose, so that tests and fuzzers reach what lies behind them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "formats/checksum.h"
#include "formats/digest.h"
#include "formats/page_codec.h"
#include "formats/store/pack_layout.h"

namespace vmsnap {

class PackForge {
 public:
  // `pack` is changed in place.
  explicit PackForge(std::span<std::byte> pack) : pack_(pack) {}

  // All that can be found from the trailer, as far as it is inside. Magic,
  // version and lengths become right only if `also_lengths`.
  void mend(bool also_lengths = false) {
    if (pack_.size() < sizeof(layout::PackHeader) + sizeof(layout::PackTrailer)) return;
    auto header = get<layout::PackHeader>(0);
    auto trailer = get<layout::PackTrailer>(trailer_offset());
    if (also_lengths) {
      header.magic = layout::pack_magic;
      trailer.magic = layout::pack_end_magic;
      if (header.version != layout::pack_version_deltas) header.version = layout::pack_version;
      trailer.version = header.version;
      header.flags &= layout::pack_sealed;
      header.reserved = {};
      trailer.reserved = {};
      trailer.flags = header.flags;
      trailer.id = header.id;
      trailer.file_length = pack_.size();
    }
    sign(header);
    put(0, header);
    mend_tables(trailer);
    sign(trailer);
    put(trailer_offset(), trailer);
  }

  template <class T>
  T get(uint64_t offset) const {
    T value;
    std::memcpy(&value, pack_.data() + offset, sizeof value);
    return value;
  }

  template <class T>
  void put(uint64_t offset, const T& value) {
    std::memcpy(pack_.data() + offset, &value, sizeof value);
  }

  uint64_t trailer_offset() const { return pack_.size() - sizeof(layout::PackTrailer); }

 private:
  template <class Block>
  static void sign(Block& block) {
    const auto bytes = std::as_bytes(std::span(&block, 1));
    block.checksum = checksum(bytes.first(offsetof(Block, checksum)), 0);
  }

  bool inside(uint64_t offset, uint64_t length) const {
    return offset <= pack_.size() && length <= pack_.size() - offset;
  }

  void mend_tables(layout::PackTrailer& trailer) {
    for (uint64_t i = 0; i < trailer.segment_count; ++i) {
      const uint64_t at = trailer.segments_offset + i * sizeof(layout::PackSegment);
      if (trailer.segments_offset > pack_.size() || !inside(at, sizeof(layout::PackSegment))) break;
      auto segment = get<layout::PackSegment>(at);
      if (!inside(segment.offset, segment.length)) continue;
      mend_frames(segment.offset, segment.offset + segment.length);
      segment.digest = digest(pack_.subspan(segment.offset, segment.length));
      put(at, segment);
    }
    if (trailer.segments_offset <= trailer_offset()) {
      trailer.tables_digest = digest(
          pack_.subspan(trailer.segments_offset, trailer_offset() - trailer.segments_offset));
    }
  }

  void mend_frames(uint64_t offset, uint64_t end) {
    const uint64_t seed = layout::image_seed(get<layout::PackHeader>(0).id);
    while (offset < end && inside(offset, sizeof(layout::FrameHeader))) {
      auto header = get<layout::FrameHeader>(offset);
      if (!inside(offset + sizeof header, header.stored_length)) return;
      StreamChecksum sum;
      sum.reset(layout::seed_at(seed, offset));
      sum.add(std::as_bytes(std::span(&header, 1)).first(offsetof(layout::FrameHeader, checksum)));
      sum.add(pack_.subspan(offset + sizeof header, header.stored_length));
      header.checksum = sum.value();
      put(offset, header);
      offset += layout::align_up(sizeof header + header.stored_length, layout::frame_alignment);
    }
  }

  const std::span<std::byte> pack_;
};

}  // namespace vmsnap
