// What is written is what is read.
#include <sys/resource.h>

#include <csignal>
#include <functional>
#include <optional>
#include <random>
#include <thread>

#include "formats/image_file.h"
#include "formats/image_layout.h"
#include "formats/verify.h"
#include "tests/formats/test_image.h"

namespace vmsnap {
namespace {

void expect_pages(const ImageReader& image, const std::vector<PageBytes>& pages) {
  PageBytes bytes;
  for (size_t i = 0; i < pages.size(); ++i) {
    bytes.fill(std::byte{0xee});
    const auto kind = image.read_page(i, bytes);
    ASSERT_TRUE(kind) << kind.error().message();
    ASSERT_EQ(bytes, pages[i]) << "page " << i;
    const PageKind expected = pages[i] == zero_page() ? PageKind::zero : PageKind::data;
    EXPECT_EQ(*kind, expected);
    EXPECT_EQ(image.page_kind(i).value(), expected);
  }
}

void expect_whole(const std::string& path) {
  const auto report = verify_image(path);
  ASSERT_TRUE(report) << report.error().message();
  EXPECT_TRUE(report->status()) << report->status().error().message();
}

std::vector<PageBytes> mixed_pages(size_t count) {
  std::vector<PageBytes> pages;
  for (size_t i = 0; i < count; ++i) {
    switch (i % 4) {
      case 0: pages.push_back(zero_page()); break;
      case 1: pages.push_back(random_page(i)); break;
      case 2: pages.push_back(text_page(i)); break;
      case 3: pages.push_back(text_page(i % 8)); break;  // two contents, many times
    }
  }
  return pages;
}

TEST(Image, RoundTrip) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  const std::vector<PageBytes> pages = mixed_pages(1600);
  const auto state = some_state(30000);
  const PageCounts counts = write_image(path, pages, {600, 999, 1}, state);
  EXPECT_EQ(counts.zero, 400u);
  EXPECT_EQ(counts.stored, 802u);
  EXPECT_EQ(counts.duplicate, 398u);

  const auto image = ImageReader::open(path).value();
  expect_pages(*image, pages);
  EXPECT_EQ(image->device_state().value(), state);
  EXPECT_EQ(image->path(), path);
  const ImageSummary& summary = image->summary();
  EXPECT_EQ(summary.format_version, 1u);
  EXPECT_EQ(summary.file_bytes, std::filesystem::file_size(path));
  EXPECT_EQ(summary.page_count, 1600u);
  EXPECT_EQ(summary.zero_pages, counts.zero);
  EXPECT_EQ(summary.duplicate_pages, counts.duplicate);
  EXPECT_EQ(summary.stored_pages, counts.stored);
  EXPECT_EQ(summary.device_state_bytes, state.size());

  const ImageInfo& info = image->info();
  EXPECT_EQ(info.id.size(), 32u);
  EXPECT_EQ(info.created_unix_ms, 1'732'140'700'123);
  EXPECT_EQ(info.source, info_of({1}).source);
  ASSERT_EQ(info.regions.size(), 3u);
  EXPECT_EQ(info.regions[1].name, "region1");
  EXPECT_EQ(info.regions[1].address, ~uint64_t{0});
  EXPECT_EQ(info.regions[2].address, uint64_t{2} << 32);
  EXPECT_EQ(info.regions[2].first_page, 1599u);
  EXPECT_EQ(info.regions[2].length, page_size);
  expect_whole(path);
}

// Whoever reads in order reads ahead, and must not see it.
TEST(Image, InAnyOrderEachPageIsItself) {
  TempDirectory directory;
  const std::vector<PageBytes> pages = mixed_pages(600);
  write_image(directory.file("a.img"), pages, {600});
  write_image(directory.file("b.img"), {pages.rbegin(), pages.rend()}, {600});
  const auto a = ImageReader::open(directory.file("a.img")).value();
  const auto b = ImageReader::open(directory.file("b.img")).value();
  std::mt19937_64 random(1);
  PageBytes bytes;
  uint64_t page = 0;
  for (int i = 0; i < 20000; ++i) {
    page = random() % 8 == 0 ? random() % 600 : (page + 600 + random() % 4 - 1) % 600;
    ASSERT_TRUE(a->read_page(page, bytes));
    ASSERT_EQ(bytes, pages[page]);
    ASSERT_TRUE(b->read_page(page, bytes));
    ASSERT_EQ(bytes, pages[599 - page]);
  }
}

// What was read ahead of one is not taken for the other's, which has its descriptor.
TEST(Image, ADamagedCopyIsNotTakenForTheOriginal) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  write_image(path, mixed_pages(600), {600});
  const auto read_from = [&](uint64_t first) -> std::optional<ErrorCode> {
    const auto image = ImageReader::open(path).value();
    PageBytes bytes;
    for (uint64_t page = first; page < 600; ++page) {
      const auto read = image->read_page(page, bytes);
      if (!read) return read.error().code();
    }
    return std::nullopt;
  };
  EXPECT_EQ(read_from(0), std::nullopt);
  std::vector<std::byte> copy = read_file(path);
  copy[ImageFile::open(path)->trailer().frames_end - 300] ^= std::byte{1};
  write_file(path, copy);
  EXPECT_EQ(read_from(597), ErrorCode::damaged);  // held to the end
}

// Made by the first release, and never made again.
TEST(Image, OfVersion1IsStillRead) {
  const std::string path = VMSNAP_SOURCE_DIR "/tests/fuzz/corpus/image_reader_fuzzer/version-1.img";
  const auto image = ImageReader::open(path);
  ASSERT_TRUE(image) << image.error().message();
  expect_pages(**image, {text_page(1), zero_page(), text_page(2), random_page(3), text_page(1)});
  EXPECT_EQ((*image)->device_state().value(), some_state(500));
  EXPECT_EQ((*image)->page_count(), 702u);
  EXPECT_EQ((*image)->info().source["kind"], "test");
  expect_whole(path);
}

TEST(Image, NothingAtAll) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  write_image(path, {}, {});
  const auto image = ImageReader::open(path).value();
  EXPECT_EQ(image->page_count(), 0u);
  EXPECT_TRUE(image->device_state().value().empty());
  EXPECT_EQ(image->next_data_page(0).value(), 0u);
  PageBytes bytes;
  EXPECT_FALSE(image->read_page(0, bytes));
  expect_whole(path);
}

TEST(Image, SparseMemoryCostsNothing) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  const uint64_t count = (uint64_t{64} << 30) / page_size;
  const std::vector<uint64_t> numbers = {0, 5'000'000, count - 1};
  {
    const Fd fd = open_file(path, O_RDWR | O_CREAT).value();
    auto writer = ImageWriter::create(fd.get(), path, count).value();
    ImageWriter::Encoder encoder;
    const auto data = join({text_page(1), text_page(2), text_page(3)});
    EXPECT_EQ(writer->write_pages(encoder, numbers, data)->stored, 3u);
    ASSERT_TRUE(writer->finish(info_of({count}), {}));
  }
  EXPECT_LT(std::filesystem::file_size(path), 64u << 10);
  const auto image = ImageReader::open(path).value();
  EXPECT_EQ(image->next_data_page(0).value(), 0u);
  EXPECT_EQ(image->next_data_page(1).value(), 5'000'000u);
  EXPECT_EQ(image->next_data_page(5'000'000).value(), 5'000'000u);
  EXPECT_EQ(image->next_data_page(5'000'001).value(), count - 1);
  EXPECT_EQ(image->next_data_page(count).value(), count);
  PageBytes bytes;
  for (size_t i = 0; i < numbers.size(); ++i) {
    ASSERT_EQ(image->read_page(numbers[i], bytes).value(), PageKind::data);
    EXPECT_EQ(bytes, text_page(i + 1));
  }
  EXPECT_EQ(image->read_page(4'999'999, bytes).value(), PageKind::zero);
  expect_whole(path);
}

TEST(Image, EveryDepthOfTheTree) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  for (const uint64_t count : {uint64_t{1}, uint64_t{512}, uint64_t{513}, uint64_t{1} << 17,
                               (uint64_t{1} << 17) + 1, (uint64_t{1} << 25) + 1}) {
    {
      const Fd fd = open_file(path, O_RDWR | O_CREAT | O_TRUNC).value();
      auto writer = ImageWriter::create(fd.get(), path, count).value();
      ImageWriter::Encoder encoder;
      const uint64_t last = count - 1;
      ASSERT_TRUE(writer->write_pages(encoder, std::span(&last, 1), text_page(9)));
      ASSERT_TRUE(writer->finish(info_of({count}), {}));
    }
    const auto image = ImageReader::open(path).value();
    PageBytes bytes;
    ASSERT_EQ(image->read_page(count - 1, bytes).value(), PageKind::data) << count;
    EXPECT_EQ(bytes, text_page(9));
    EXPECT_EQ(image->next_data_page(0).value(), count - 1);
    expect_whole(path);
  }
}

TEST(Image, OnePatternEverywhereIsStoredOnce) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  const std::vector<PageBytes> pages(3000, text_page(7));
  const PageCounts counts = write_image(path, pages, {3000});
  EXPECT_EQ(counts.stored, 1u);
  EXPECT_EQ(counts.duplicate, 2999u);
  expect_pages(*ImageReader::open(path).value(), pages);
}

// Of a run only the first is hashed: runs of all lengths, over the ends of batches
// too, of pages that differ in their last byte only, some with a zero page inside.
TEST(Image, RunsOfOnePageAreStoredOnce) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  std::vector<PageBytes> pages;
  for (size_t length = 1; length < 40; ++length) {
    PageBytes page = text_page(3);
    page.back() = static_cast<std::byte>(length % 3);
    pages.insert(pages.end(), length, page);
    if (length % 2) pages[pages.size() - length / 2 - 1] = zero_page();
  }
  ImageWriterOptions colliding;
  colliding.hash = [](auto) { return uint64_t{42}; };
  for (const ImageWriterOptions& options : {ImageWriterOptions(), colliding}) {
    const PageCounts counts = write_image(path, pages, {pages.size()}, {}, options);
    EXPECT_EQ(counts.zero, 20u);
    EXPECT_EQ(counts.stored + counts.duplicate, pages.size() - 20);
    if (!options.hash) {
      EXPECT_EQ(counts.stored, 3u);
    }
    expect_pages(*ImageReader::open(path).value(), pages);
    expect_whole(path);
  }
}

// Four threads, each with every fourth batch; half of the contents are shared.
TEST(Image, FourWritersStoreEachContentOnce) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  constexpr size_t batch = 50;
  constexpr size_t batches = 80;
  std::vector<PageBytes> pages;
  for (size_t i = 0; i < batch * batches; ++i) {
    pages.push_back(i % 2 == 0 ? text_page(i % 100) : text_page(1000 + i));
  }
  {
    const Fd fd = open_file(path, O_RDWR | O_CREAT).value();
    auto writer = ImageWriter::create(fd.get(), path, pages.size()).value();
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        ImageWriter::Encoder encoder;
        for (size_t b = t; b < batches; b += 4) {
          std::vector<uint64_t> numbers;
          for (size_t k = 0; k < batch; ++k) numbers.push_back(b * batch + k);
          const std::vector<PageBytes> part(pages.begin() + b * batch,
                                            pages.begin() + (b + 1) * batch);
          EXPECT_TRUE(writer->write_pages(encoder, numbers, join(part)));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    ASSERT_TRUE(writer->finish(info_of({pages.size()}), {}));
  }
  const auto image = ImageReader::open(path).value();
  EXPECT_EQ(image->summary().stored_pages, 50u + pages.size() / 2);
  std::vector<std::thread> readers;
  for (int t = 0; t < 4; ++t) readers.emplace_back([&] { expect_pages(*image, pages); });
  for (std::thread& reader : readers) reader.join();
  expect_whole(path);
}

// Every hash equal: space is lost, data never.
TEST(Image, CollisionsCostSpaceOnly) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  std::vector<PageBytes> pages = mixed_pages(1200);
  ImageWriterOptions options;
  options.hash = [](auto) { return uint64_t{42}; };
  const PageCounts counts = write_image(path, pages, {1200}, {}, options);
  EXPECT_EQ(counts.zero, 300u);
  EXPECT_GE(counts.stored, 602u);
  expect_pages(*ImageReader::open(path).value(), pages);
  expect_whole(path);
}

TEST(Image, CollisionsOfFourWritersCostSpaceOnly) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  const std::vector<PageBytes> pages = mixed_pages(800);
  ImageWriterOptions options;
  options.hash = [](auto bytes) { return uint64_t{static_cast<uint8_t>(bytes[100]) % 2u}; };
  {
    const Fd fd = open_file(path, O_RDWR | O_CREAT).value();
    auto writer = ImageWriter::create(fd.get(), path, pages.size(), options).value();
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        ImageWriter::Encoder encoder;
        for (uint64_t k = t; k < pages.size(); k += 4) {
          EXPECT_TRUE(writer->write_pages(encoder, std::span(&k, 1), pages[k]));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    ASSERT_TRUE(writer->finish(info_of({pages.size()}), {}));
  }
  expect_pages(*ImageReader::open(path).value(), pages);
  expect_whole(path);
}

// More contents than hints, each of them twice.
TEST(Image, ForgottenHintsCostSpaceOnly) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  std::vector<PageBytes> pages;
  for (size_t i = 0; i < 8000; ++i) pages.push_back(text_page(i % 4000));
  ImageWriterOptions options;
  options.hint_entries = 1;
  const PageCounts counts = write_image(path, pages, {8000}, {}, options);
  EXPECT_GT(counts.stored, 4000u);
  expect_pages(*ImageReader::open(path).value(), pages);
}

TEST(Image, PagesOutOfRangeAreRefused) {
  TempDirectory directory;
  const Fd fd = open_file(directory.file("a.img"), O_RDWR | O_CREAT).value();
  auto writer = ImageWriter::create(fd.get(), "a.img", 10).value();
  ImageWriter::Encoder encoder;
  const uint64_t number = 10;
  EXPECT_FALSE(writer->write_pages(encoder, std::span(&number, 1), text_page(1)));
  EXPECT_FALSE(writer->write_pages(encoder, {}, text_page(1)));
  EXPECT_FALSE(writer->finish(info_of({11}), {}));  // 10 pages, regions of 11
  EXPECT_FALSE(ImageWriter::create(fd.get(), "a.img", layout::max_page_count + 1));
}

// A file size limit stands for a full disk: both are no_space.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit = {bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() { ::setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_ = {};
};

TEST(Image, FullDiskIsNoSpace) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  {
    AtomicFile file = AtomicFile::create(path, false).value();
    auto writer = ImageWriter::create(file.fd(), path, 1000).value();
    ImageWriter::Encoder encoder;
    FileSizeLimit limit(100'000);
    Status status;
    for (uint64_t k = 0; k < 100 && status; ++k) {
      const auto counts = writer->write_pages(encoder, std::span(&k, 1), random_page(k));
      if (!counts) status = tl::unexpected(counts.error());
    }
    ASSERT_FALSE(status);
    EXPECT_EQ(status.error().code(), ErrorCode::no_space);
    EXPECT_EQ(status.error().message(), "cannot write " + path + ": File too large");
    EXPECT_EQ(status.error().remedy(), "Free space there, or write somewhere else.");

    // The failed batch left a gap: that file can never become an image.
    const auto finished = writer->finish(info_of({1000}), {});
    ASSERT_FALSE(finished);
    EXPECT_EQ(finished.error().message(), path + " is incomplete: an earlier write failed");
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(Image, FullDiskInFinishIsNoSpace) {
  TempDirectory directory;
  const std::string path = directory.file("a.img");
  const Fd fd = open_file(path, O_RDWR | O_CREAT).value();
  auto writer = ImageWriter::create(fd.get(), path, 1000).value();
  FileSizeLimit limit(10'000);
  const auto finished = writer->finish(info_of({1000}), some_state(1 << 20));
  ASSERT_FALSE(finished);
  EXPECT_EQ(finished.error().code(), ErrorCode::no_space);
}

}  // namespace
}  // namespace vmsnap
