// What a page costs, in bytes and in time, by the way it is compressed: pages to
// a frame, zstd level, dictionary, and a similar page as the prefix. Each way is
// tried on all pages of a raw memory dump that an image would store, in frames
// as an image has them.
//
//   codec_table RAW SCRATCH [images]
//
// SCRATCH is written, read and left; one JSON line a way. First come two images as
// a snapshot writes them, without and with deltas; `images`: these alone.
//
// Compressing counts processor time; reading counts the time that a waiting
// guest would see, with the file in the page cache and the pages at random.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <zdict.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <unordered_set>
#include <vector>

#include "formats/checksum.h"
#include "formats/file.h"
#include "formats/image_layout.h"
#include "formats/image_reader.h"
#include "formats/image_writer.h"
#include "tests/bench/codec_frames.h"

namespace {

using namespace vmsnap;

constexpr size_t reads = 20000;

Dump read_dump(const std::string& path) {
  const Fd fd = must(open_file(path, O_RDONLY));
  struct stat status = {};
  ::fstat(fd.get(), &status);
  const auto length = static_cast<size_t>(status.st_size) / page_size * page_size;
  void* mapped = ::mmap(nullptr, length, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (mapped == MAP_FAILED) must(Status(fail_errno(errno, "cannot map {}", path)));
  const auto* bytes = static_cast<const std::byte*>(mapped);

  Dump dump;
  dump.pages = length / page_size;
  const Bytes zeros(page_size);
  std::unordered_set<uint64_t> seen;
  for (size_t at = 0; at < length; at += page_size) {
    const std::span page(bytes + at, page_size);
    if (std::memcmp(page.data(), zeros.data(), page_size) == 0) {
      ++dump.zero;
    } else if (seen.insert(checksum(page, 0)).second) {
      dump.stored.insert(dump.stored.end(), page.begin(), page.end());
    }
  }
  ::munmap(mapped, length);
  return dump;
}

// A dictionary from pages all over the dump, a hundred times its size of them.
Bytes train(const Dump& dump, size_t size) {
  const size_t pages = dump.stored.size() / page_size;
  const size_t wanted = std::min(pages, size * 100 / page_size);
  Bytes samples;
  for (size_t i = 0; i < wanted; ++i) {
    const auto* page = dump.stored.data() + pages * i / wanted * page_size;
    samples.insert(samples.end(), page, page + page_size);
  }
  const std::vector<size_t> lengths(wanted, page_size);
  Bytes dictionary(size);
  dictionary.resize(must_zstd(ZDICT_trainFromBuffer(dictionary.data(), size, samples.data(),
                                                    lengths.data(),
                                                    static_cast<unsigned>(wanted))));
  return dictionary;
}

struct Times {
  std::vector<double> whole, read, check, decode;  // microseconds
};

// Single pages at random; every one is compared with the dump.
Times read_pages(const Dump& dump, const Packed& packed, Way way, const Bytes& dictionary, int fd) {
  Reader reader(fd, way, dictionary);
  Times times;
  std::mt19937_64 random(3);
  for (size_t i = 0; i < reads; ++i) {
    const size_t page = random() % (dump.stored.size() / page_size);
    reader.read_us = reader.check_us = reader.decode_us = 0;
    const auto start = Clock::now();
    const auto pages = reader.read(packed.offsets[page / way.frame_pages]);
    times.whole.push_back(
        std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    if (std::memcmp(pages.data() + page % way.frame_pages * page_size,
                    &dump.stored[page * page_size], page_size) != 0) {
      std::fprintf(stderr, "codec_table: page %zu came back changed\n", page);
      std::exit(1);
    }
    times.read.push_back(reader.read_us);
    times.check.push_back(reader.check_us);
    times.decode.push_back(reader.decode_us);
  }
  for (auto* all : {&times.whole, &times.read, &times.check, &times.decode}) {
    std::sort(all->begin(), all->end());
  }
  return times;
}

double at(const std::vector<double>& sorted, double share) {
  return sorted[static_cast<size_t>(share * static_cast<double>(sorted.size() - 1))];
}

// The image that a snapshot would be, by one thread, and its pages read back.
void measure_image(const Dump& dump, bool deltas, const std::string& path) {
  const Fd fd = must(open_file(path, O_RDWR | O_CREAT | O_TRUNC));
  const size_t pages = dump.stored.size() / page_size;
  const auto writer = must(ImageWriter::create(fd.get(), path, pages, {.deltas = deltas}));
  ImageWriter::Encoder encoder;
  const double begin = processor_seconds();
  std::vector<uint64_t> numbers;
  for (size_t first = 0; first < pages; first += numbers.size()) {
    numbers.resize(std::min<size_t>(256, pages - first));
    std::iota(numbers.begin(), numbers.end(), first);
    must(writer->write_pages(encoder, numbers,
                             std::span(dump.stored)
                                 .subspan(first * page_size, numbers.size() * page_size)));
  }
  const double seconds = processor_seconds() - begin;
  ImageInfo info;
  info.regions.push_back({.name = "dump", .length = dump.stored.size()});
  const uint64_t bytes = must(writer->finish(info, {}));

  const auto image = must(ImageReader::open(path));
  std::vector<double> times;
  std::array<std::byte, page_size> page;
  std::mt19937_64 random(3);
  for (size_t i = 0; i < reads; ++i) {
    const size_t number = random() % pages;
    const auto start = Clock::now();
    must(image->read_page(number, page));
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    if (std::memcmp(page.data(), &dump.stored[number * page_size], page_size) != 0) {
      std::fprintf(stderr, "codec_table: page %zu came back changed\n", number);
      std::exit(1);
    }
  }
  std::sort(times.begin(), times.end());
  std::printf("%s\n", nlohmann::json({{"vmsnap", deltas ? "--delta" : ""},
                                      {"image", bytes},
                                      {"compress_mb_s", static_cast<double>(dump.stored.size()) /
                                                            seconds / 1e6},
                                      {"p50_us", at(times, 0.5)},
                                      {"p99_us", at(times, 0.99)}})
                          .dump()
                          .c_str());
  std::fflush(stdout);
}

// All of an image but its frames, where every leaf is needed.
uint64_t rest_of_image(const Dump& dump) {
  const uint64_t leaves = (dump.pages + layout::leaf_entries - 1) / layout::leaf_entries;
  const uint64_t inner = (leaves + layout::inner_references - 1) / layout::inner_references;
  return (leaves + inner + 3) * layout::block_size;
}

void measure(const Dump& dump, Way way, const Bytes& dictionary, const std::string& scratch) {
  const Fd fd = must(open_file(scratch, O_RDWR | O_CREAT | O_TRUNC));
  const Packed packed = pack(dump, way, dictionary, fd.get());
  const Times times = read_pages(dump, packed, way, dictionary, fd.get());
  const auto stored = static_cast<double>(dump.stored.size());
  const uint64_t rest = rest_of_image(dump) + dictionary.size();
  const nlohmann::json line = {
      {"kib", way.frame_pages * page_size / 1024},
      {"level", way.level},
      {"dictionary_kib", (dictionary.size() + 512) / 1024},
      {"bases", way.bases},
      {"based", static_cast<double>(packed.based) * page_size / stored},
      {"ratio", stored / static_cast<double>(packed.bytes)},
      {"image", packed.bytes + rest},
      {"lean_image", packed.lean_bytes + rest},
      {"compress_mb_s", stored / packed.seconds / 1e6},
      {"p50_us", at(times.whole, 0.5)},
      {"p99_us", at(times.whole, 0.99)},
      {"read_us", at(times.read, 0.5)},
      {"check_us", at(times.check, 0.5)},
      {"decode_us", at(times.decode, 0.5)},
  };
  std::printf("%s\n", line.dump().c_str());
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "usage: codec_table RAW SCRATCH [images]\n");
    return 2;
  }
  const Dump dump = read_dump(argv[1]);
  if (dump.stored.empty()) {
    std::fprintf(stderr, "codec_table: %s has no page that is not zero\n", argv[1]);
    return 1;
  }
  const size_t stored = dump.stored.size() / page_size;
  std::printf("%s\n", nlohmann::json({{"pages", dump.pages},
                                      {"zero", dump.zero},
                                      {"duplicate", dump.pages - dump.zero - stored},
                                      {"stored", stored}})
                          .dump()
                          .c_str());
  measure_image(dump, false, argv[2]);
  measure_image(dump, true, argv[2]);
  if (argc == 4) return 0;
  for (const size_t dictionary_bytes : {0, 16 << 10, 112 << 10}) {
    Bytes dictionary;
    if (dictionary_bytes > 0) {
      const double begin = processor_seconds();
      dictionary = train(dump, dictionary_bytes);
      std::printf("%s\n", nlohmann::json({{"trained_kib", dictionary_bytes >> 10},
                                          {"seconds", processor_seconds() - begin}})
                              .dump()
                              .c_str());
    }
    for (const size_t frame_pages : {1, 2, 4, 16}) {
      for (const int level : {-1, 1, 3, 6, 9}) {
        measure(dump, {frame_pages, level}, dictionary, argv[2]);
      }
    }
    if (dictionary_bytes == 16 << 10) continue;
    for (const int level : {1, 3, 4, 5, 6}) {
      measure(dump, {1, level, true}, dictionary, argv[2]);
    }
  }
}
