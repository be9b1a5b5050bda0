// Small images with content that can be told page by page.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "formats/file.h"
#include "formats/image_reader.h"
#include "formats/image_writer.h"

namespace vmsnap::testing {

// A directory that is gone afterwards.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = "/tmp/vmsnap-restore-XXXXXX";
    if (!::mkdtemp(name.data())) std::abort();
    path_ = name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

using Page = std::array<std::byte, page_size>;

// Pages 0, 3, 6, ... are zero; the others differ from page to page and do not
// compress to nothing.
inline bool is_zero_page(uint64_t page) { return page % 3 == 0; }

inline Page expected_page(uint64_t page) {
  Page bytes = {};
  if (is_zero_page(page)) return bytes;
  uint64_t value = page * 0x9e3779b97f4a7c15 + 1;
  for (size_t i = 0; i < page_size; i += 8) {
    value = value * 6364136223846793005 + 1442695040888963407;
    std::memcpy(bytes.data() + i, &value, 8);
  }
  return bytes;
}

inline void write_image(const std::string& path, uint64_t pages,
                        nlohmann::json source = {{"kind", "process"}},
                        std::vector<Region> regions = {},
                        const std::vector<uint64_t>& working_set = {}) {
  const Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  ASSERT_TRUE(fd);
  auto writer = ImageWriter::create(fd.get(), path, pages);
  ASSERT_TRUE(writer) << writer.error().message();
  ImageWriter::Encoder encoder;
  for (uint64_t page = 0; page < pages; ++page) {
    const Page bytes = expected_page(page);
    auto written = (*writer)->write_pages(encoder, std::span(&page, 1), bytes);
    ASSERT_TRUE(written) << written.error().message();
  }
  if (regions.empty()) regions = {{"range0", 0x10000, pages * page_size, 0}};
  ImageInfo info;
  info.id = "0123456789abcdef0123456789abcdef";
  info.regions = std::move(regions);
  info.source = std::move(source);
  auto finished = (*writer)->finish(info, {}, working_set);
  ASSERT_TRUE(finished) << finished.error().message();
}

inline std::unique_ptr<ImageReader> open_image(const std::string& path) {
  auto reader = ImageReader::open(path);
  if (!reader) {
    ADD_FAILURE() << reader.error().message();
    std::abort();
  }
  return *std::move(reader);
}

// Frames of an image's own that cannot be read while `error_number`, of
// open(2) say, is not 0.
class FailingFrames : public FrameFiles {
 public:
  FailingFrames(const ImageFile& file, const std::atomic<int>& error_number)
      : own_(file.own_frames(), file.header().id), error_number_(error_number) {}
  Result<FrameSource> source(uint64_t pack) const override {
    const int failed = error_number_.load();
    if (failed != 0) return fail_errno(failed, "cannot open the pack");
    return own_.source(pack);
  }
  Result<layout::ImageId> file_id(uint64_t pack) const override { return own_.file_id(pack); }

 private:
  const OwnFrames own_;
  const std::atomic<int>& error_number_;
};

inline std::unique_ptr<ImageReader> open_failing_image(const std::string& path,
                                                       const std::atomic<int>& error_number) {
  ImageFile file = *ImageFile::open(path);
  auto frames = std::make_unique<FailingFrames>(file, error_number);
  return *ImageReader::open(std::move(file), std::move(frames));
}

// Damages the stored bytes of one data page: finds them by looking for which
// flipped byte of the file makes just this page unreadable.
inline void damage_page(const std::string& path, uint64_t page) {
  const uint64_t size = std::filesystem::file_size(path);
  const Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_TRUE(fd);
  for (uint64_t at = 64; at < size; at += 512) {
    std::byte before;
    ASSERT_EQ(::pread(fd.get(), &before, 1, static_cast<off_t>(at)), 1);
    const std::byte flipped = before ^ std::byte{0x40};
    ASSERT_EQ(::pwrite(fd.get(), &flipped, 1, static_cast<off_t>(at)), 1);
    if (const auto reader = ImageReader::open(path)) {
      Page bytes;
      if (!(*reader)->read_page(page, bytes) && (*reader)->read_page(page + 1, bytes)) return;
    }
    ASSERT_EQ(::pwrite(fd.get(), &before, 1, static_cast<off_t>(at)), 1);
  }
  FAIL() << "no byte of " << path << " belongs to page " << page << " alone";
}

}  // namespace vmsnap::testing
