// Images for tests: a directory to put them in, pages to put into them.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "formats/file.h"
#include "formats/image_reader.h"
#include "formats/image_writer.h"

namespace vmsnap {

using PageBytes = std::array<std::byte, page_size>;

// A new directory, removed with all that is in it.
class TempDirectory {
 public:
  TempDirectory() {
    std::string name = std::filesystem::temp_directory_path() / "vmsnap-test-XXXXXX";
    path_ = ::mkdtemp(name.data()) ? name : "";
    EXPECT_FALSE(path_.empty());
  }
  ~TempDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;

  std::string file(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline PageBytes zero_page() { return {}; }

// Does not compress; the same for the same seed.
inline PageBytes random_page(uint64_t seed) {
  std::mt19937_64 random(seed);
  PageBytes page;
  for (size_t i = 0; i < page_size; i += sizeof(uint64_t)) {
    const uint64_t word = random();
    std::memcpy(page.data() + i, &word, sizeof word);
  }
  return page;
}

// Compresses well; different for each number.
inline PageBytes text_page(uint64_t number) {
  PageBytes page;
  std::string text;
  while (text.size() < page_size) text += "page number " + std::to_string(number) + ", ";
  std::memcpy(page.data(), text.data(), page_size);
  return page;
}

inline std::vector<std::byte> join(const std::vector<PageBytes>& pages) {
  std::vector<std::byte> bytes;
  for (const PageBytes& page : pages) bytes.insert(bytes.end(), page.begin(), page.end());
  return bytes;
}

inline ImageInfo info_of(const std::vector<uint64_t>& region_pages) {
  ImageInfo info;
  info.created_unix_ms = 1'732'140'700'123;
  for (size_t i = 0; i < region_pages.size(); ++i) {
    info.regions.push_back({.name = "region" + std::to_string(i),
                            .address = i == 1 ? ~uint64_t{0} : i << 32,
                            .length = region_pages[i] * page_size});
  }
  info.source = {{"kind", "test"}, {"args", {"a", "b"}}};
  return info;
}

inline std::vector<std::byte> some_state(size_t bytes) {
  std::vector<std::byte> state(bytes);
  for (size_t i = 0; i < bytes; ++i) state[i] = static_cast<std::byte>(i % 251);
  return state;
}

// An image at `path` of pages 0.. as given, in regions of `region_pages`.
inline PageCounts write_image(const std::string& path, const std::vector<PageBytes>& pages,
                              const std::vector<uint64_t>& region_pages,
                              std::span<const std::byte> device_state = {},
                              ImageWriterOptions options = {}) {
  const Fd fd = open_file(path, O_RDWR | O_CREAT | O_TRUNC).value();
  const ImageInfo info = info_of(region_pages);
  auto writer =
      ImageWriter::create(fd.get(), path, total_pages(info.regions), std::move(options)).value();
  ImageWriter::Encoder encoder;
  std::vector<uint64_t> numbers(pages.size());
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = i;
  const PageCounts counts = writer->write_pages(encoder, numbers, join(pages)).value();
  const uint64_t length = writer->finish(info, device_state).value();
  EXPECT_EQ(std::filesystem::file_size(path), length);
  return counts;
}

inline std::vector<std::byte> read_file(const std::string& path) {
  std::vector<std::byte> bytes(std::filesystem::file_size(path));
  const Fd fd = open_file(path, O_RDONLY).value();
  EXPECT_TRUE(read_exact_at(fd.get(), bytes, 0, path));
  return bytes;
}

inline void write_file(const std::string& path, std::span<const std::byte> bytes) {
  std::filesystem::remove(path);  // ext4 flushes a file that is truncated and written again
  const Fd fd = open_file(path, O_WRONLY | O_CREAT).value();
  EXPECT_TRUE(write_all(fd.get(), bytes, path));
}

}  // namespace vmsnap
