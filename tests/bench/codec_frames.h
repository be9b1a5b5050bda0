// Frames made in ways that an image might use, and read again.
//
// Everything here ends the program on an error. For one thread.
#pragma once

#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <span>
#include <vector>

#include "formats/checksum.h"
#include "formats/file.h"
#include "formats/image_layout.h"
#include "formats/page_entry.h"
#include "formats/similar_pages.h"

namespace vmsnap {

using Clock = std::chrono::steady_clock;
using Bytes = std::vector<std::byte>;

inline constexpr uint64_t seed = 0x9e3779b97f4a7c15;
// What a zstd frame needs at least: two of the seven bytes of its header. The
// rest is the magic and the length, which are the same in all frames.
inline constexpr size_t zstd_header_excess = 5;
// What share of its bytes a page must save to be given a base: it costs the
// reader a second frame.
inline constexpr double base_gain = 0.1;

template <class T>
T must(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "codec_table: %s\n", result.error().message().c_str());
    std::exit(1);
  }
  return *std::move(result);
}
inline void must(const Status& status) {
  if (!status) {
    std::fprintf(stderr, "codec_table: %s\n", status.error().message().c_str());
    std::exit(1);
  }
}
inline size_t must_zstd(size_t code) {
  if (ZSTD_isError(code)) {
    std::fprintf(stderr, "codec_table: zstd: %s\n", ZSTD_getErrorName(code));
    std::exit(1);
  }
  return code;
}

inline double processor_seconds() {
  timespec now = {};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

struct Dump {
  uint64_t pages = 0;
  uint64_t zero = 0;
  Bytes stored;  // the pages that are neither zero nor seen before, one after another
};

struct Way {
  size_t frame_pages;
  int level;
  bool bases = false;  // whether pages may have one
};

using Compressor = std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)>;
using Decompressor = std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)>;

inline Compressor compressor(int level) {
  Compressor made(ZSTD_createCCtx(), ZSTD_freeCCtx);
  ZSTD_CCtx_setParameter(made.get(), ZSTD_c_compressionLevel, level);
  ZSTD_CCtx_setParameter(made.get(), ZSTD_c_dictIDFlag, 0);
  return made;
}

struct Packed {
  std::vector<uint64_t> offsets;  // of the frames in the file
  uint64_t lean_bytes = 0;        // the file's size if zstd frames had no needless fields
  uint64_t bytes = 0;
  uint64_t based = 0;  // pages with a base
  double seconds = 0;  // spent in zstd, and looking for bases
};

// Compresses pages against similar ones that came before.
class Bases {
 public:
  Bases(const Dump& dump, Way way)
      : dump_(dump), context_(compressor(way.level)) {}

  // The payload of `page` for a frame with a base, if that saves enough beside
  // `alone` bytes; else 0, and the page may be a base of later ones.
  size_t compress(uint32_t page, size_t alone, const std::vector<uint64_t>& offsets,
                  std::span<std::byte> out) {
    const auto bytes = at(page);
    const Sketch sketch(bytes);
    candidates_.clear();
    similar_->find(sketch, 0, candidates_);
    if (const uint64_t found = most_frequent(candidates_); found != 0) {
      const auto base = static_cast<uint32_t>(PageEntry::from_bits(found).offset / page_size);
      const uint64_t offset = offsets[base];
      ZSTD_CCtx_refPrefix(context_.get(), at(base).data(), page_size);
      const size_t used =
          sizeof offset + ZSTD_compress2(context_.get(), out.data() + sizeof offset,
                                         out.size() - sizeof offset, bytes.data(), bytes.size());
      if (static_cast<double>(used) < static_cast<double>(alone) * (1 - base_gain)) {
        std::memcpy(out.data(), &offset, sizeof offset);
        return used;
      }
    }
    similar_->add(sketch, PageEntry{.offset = page * page_size}.pack_bits());
    return 0;
  }

 private:
  std::span<const std::byte, page_size> at(uint32_t page) const {
    return std::span<const std::byte, page_size>(&dump_.stored[page * page_size], page_size);
  }

  const Dump& dump_;
  Compressor context_;
  std::unique_ptr<SimilarPages> similar_ = must(SimilarPages::create(1 << 22));
  std::vector<uint64_t> candidates_;
};

inline uint64_t checksum_of(StreamChecksum& sum, const layout::FrameHeader& header,
                     std::span<const std::byte> payload, uint64_t offset) {
  sum.reset(layout::seed_at(seed, offset));
  sum.add(std::as_bytes(std::span(&header, 1)).first(offsetof(layout::FrameHeader, checksum)));
  sum.add(payload);
  return sum.value();
}

// Frames as formats/page_codec.cpp makes them, and others.
inline Packed pack(const Dump& dump, Way way, const Bytes& dictionary, int fd) {
  const Compressor context = compressor(way.level);
  const std::unique_ptr<ZSTD_CDict, decltype(&ZSTD_freeCDict)> prepared(
      dictionary.empty() ? nullptr
                         : ZSTD_createCDict(dictionary.data(), dictionary.size(), way.level),
      ZSTD_freeCDict);
  ZSTD_CCtx_refCDict(context.get(), prepared.get());
  Bases bases(dump, way);

  Packed packed;
  StreamChecksum sum;
  Bytes alone(way.frame_pages * page_size), based(page_size), buffered;
  for (size_t at = 0; at < dump.stored.size(); at += way.frame_pages * page_size) {
    const size_t length = std::min(way.frame_pages * page_size, dump.stored.size() - at);
    layout::FrameHeader header;
    header.codec = layout::codec_zstd;
    header.last_slot = static_cast<uint8_t>(length / page_size - 1);
    const double begin = processor_seconds();
    size_t used =
        ZSTD_compress2(context.get(), alone.data(), length - 1, &dump.stored[at], length);
    std::span<const std::byte> payload(alone.data(), ZSTD_isError(used) ? length : used);
    if (way.bases) {
      used = bases.compress(static_cast<uint32_t>(at / page_size), payload.size(), packed.offsets,
                            based);
    }
    packed.seconds += processor_seconds() - begin;
    if (way.bases && used > 0) {
      header.codec = layout::codec_delta;
      payload = std::span(based).first(used);
      ++packed.based;
    } else if (payload.size() == length) {
      header.codec = layout::codec_raw;
      payload = std::span(dump.stored).subspan(at, length);
    }
    header.stored_length = static_cast<uint32_t>(payload.size());
    header.checksum = checksum_of(sum, header, payload, packed.bytes);

    const auto aligned = [&](size_t bytes) {
      return layout::align_up(sizeof header + bytes, layout::frame_alignment);
    };
    const size_t excess = header.codec == layout::codec_raw ? 0 : zstd_header_excess;
    packed.lean_bytes += aligned(payload.size() - excess);
    packed.offsets.push_back(packed.bytes);
    packed.bytes += aligned(payload.size());
    const auto head = std::as_bytes(std::span(&header, 1));
    buffered.insert(buffered.end(), head.begin(), head.end());
    buffered.insert(buffered.end(), payload.begin(), payload.end());
    buffered.resize(buffered.size() + aligned(payload.size()) - payload.size() - sizeof header);
    if (buffered.size() > (1 << 20)) {
      must(write_all(fd, buffered, "the scratch file"));
      buffered.clear();
    }
  }
  must(write_all(fd, buffered, "the scratch file"));
  return packed;
}

// Reads frames the way of formats/frame_reader.cpp: first as much as half of the
// pages can take, but no less than one page, and the rest if the frame is longer.
class Reader {
 public:
  Reader(int fd, Way way, const Bytes& dictionary)
      : fd_(fd),
        first_(layout::max_frame_bytes(std::max<size_t>(1, way.frame_pages / 2))),
        frame_(layout::max_frame_bytes(way.frame_pages)),
        pages_(way.frame_pages * page_size),
        dictionary_(dictionary.empty() ? nullptr
                                       : ZSTD_createDDict(dictionary.data(), dictionary.size()),
                    ZSTD_freeDDict) {
    ZSTD_DCtx_refDDict(context_.get(), dictionary_.get());
  }

  // The pages of the frame at `offset`; valid until the next call.
  std::span<const std::byte> read(uint64_t offset) {
    const size_t length = load(offset);
    if (header_.codec != layout::codec_delta) return {pages_.data(), decode_alone(length)};

    const Bytes own(payload().begin(), payload().end());
    uint64_t base = 0;
    std::memcpy(&base, own.data(), sizeof base);
    const size_t base_length = load(base);
    base_.assign(pages_.begin(), pages_.begin() + static_cast<long>(decode_alone(base_length)));
    const auto start = Clock::now();
    ZSTD_DCtx_refPrefix(with_base_.get(), base_.data(), base_.size());
    const size_t got = must_zstd(ZSTD_decompressDCtx(with_base_.get(), pages_.data(),
                                                     pages_.size(), own.data() + sizeof base,
                                                     own.size() - sizeof base));
    decode_us += us_since(start);
    return {pages_.data(), got};
  }

  // What the calls since they were set to 0 have spent on each.
  double read_us = 0, check_us = 0, decode_us = 0;

 private:
  static double us_since(Clock::time_point start) {
    return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
  }

  std::span<const std::byte> payload() const {
    return std::span(frame_).subspan(sizeof header_, header_.stored_length);
  }

  // Reads and checks a frame; returns the length of its pages.
  size_t load(uint64_t offset) {
    auto start = Clock::now();
    const auto got = static_cast<size_t>(
        std::max<ssize_t>(0, ::pread(fd_, frame_.data(), first_, static_cast<off_t>(offset))));
    std::memcpy(&header_, frame_.data(), sizeof header_);
    const size_t need = sizeof header_ + header_.stored_length;
    if (need > got) {
      must(read_exact_at(fd_, std::span(frame_).subspan(got, need - got), offset + got, "scratch"));
    }
    read_us += us_since(start);
    start = Clock::now();
    if (checksum_of(sum_, header_, payload(), offset) != header_.checksum) {
      std::fprintf(stderr, "codec_table: a frame's checksum does not match\n");
      std::exit(1);
    }
    check_us += us_since(start);
    return (header_.last_slot + size_t{1}) * page_size;
  }

  size_t decode_alone(size_t length) {
    const auto start = Clock::now();
    if (header_.codec == layout::codec_raw) {
      std::memcpy(pages_.data(), payload().data(), length);
    } else {
      must_zstd(ZSTD_decompressDCtx(context_.get(), pages_.data(), length, payload().data(),
                                    payload().size()));
    }
    decode_us += us_since(start);
    return length;
  }

  int fd_;
  size_t first_;
  Bytes frame_, pages_, base_;
  layout::FrameHeader header_;
  StreamChecksum sum_;
  std::unique_ptr<ZSTD_DDict, decltype(&ZSTD_freeDDict)> dictionary_;
  Decompressor context_{ZSTD_createDCtx(), ZSTD_freeDCtx};
  Decompressor with_base_{ZSTD_createDCtx(), ZSTD_freeDCtx};
};

}  // namespace vmsnap
