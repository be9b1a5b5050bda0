// Delta frames: pages compressed with a similar one.
#include <algorithm>
#include <set>
#include <thread>

#include "formats/frame_reader.h"
#include "formats/image_file.h"
#include "formats/page_codec.h"
#include "formats/page_entry.h"
#include "formats/similar_pages.h"
#include "formats/verify.h"
#include "tests/formats/image_forge.h"
#include "tests/formats/similar_page.h"
#include "tests/formats/test_image.h"

namespace vmsnap {
namespace {

TEST(SimilarPages, ShareHashesWhereverTheirBytesAre) {
  const auto table = SimilarPages::create(1 << 10).value();
  const PageEntry entry = {.pack = 3, .offset = 4096};
  table->add(Sketch(random_page(1)), entry.pack_bits());
  std::vector<uint64_t> found;
  table->find(Sketch(similar_page(1, 7)), 3, found);
  EXPECT_GE(found.size(), Sketch::max_hashes / 2);
  EXPECT_EQ(most_frequent(found), entry.pack_bits());
  found.clear();
  table->find(Sketch(similar_page(1, 7)), 2, found);  // another file
  table->find(Sketch(random_page(2)), 3, found);
  EXPECT_TRUE(found.empty());
  EXPECT_EQ(most_frequent(found), 0u);
}

TEST(SimilarPages, ZerosHaveNoSketch) { EXPECT_TRUE(Sketch(zero_page()).hashes().empty()); }

class DeltaFrame : public testing::TestWithParam<bool> {};

TEST_P(DeltaFrame, IsReadWithItsBaseOnly) {
  const SecretKey key = SecretKey::from_bytes(std::array<uint8_t, SecretKey::size>{1}).value();
  const bool sealed = GetParam();
  const FrameSite site = {.offset = 8192, .seed = 5, .key = sealed ? &key : nullptr};
  const PageBytes base = random_page(1), page = similar_page(1, 1), other = random_page(2);
  FrameEncoder encoder;
  std::array<std::byte, layout::max_frame_bytes(1)> frame;
  const size_t length = encoder.encode_delta(page, base, sealed, frame.size(), frame);
  ASSERT_GT(length, 0u);
  EXPECT_LT(length, 1000u);
  EXPECT_EQ(encoder.encode_delta(page, base, sealed, length - 8, frame), 0u);
  ASSERT_EQ(encoder.encode_delta(page, base, sealed, frame.size(), frame), length);
  FrameEncoder::set_base(frame, 4096);
  encoder.finish(frame, site);

  layout::FrameHeader header;
  std::memcpy(&header, frame.data(), sizeof header);
  EXPECT_TRUE(FrameDecoder::plausible(header, sealed));
  FrameDecoder decoder;
  const auto payload = std::span(frame).subspan(sizeof header, header.stored_length);
  ASSERT_TRUE(decoder.intact(header, payload, site));
  const auto content = decoder.open(header, payload, site);
  ASSERT_TRUE(content);
  EXPECT_EQ(FrameDecoder::base_offset(*content), 4096u);
  PageBytes got;
  EXPECT_TRUE(decoder.decode(header, *content, base, got));
  EXPECT_EQ(got, page);
  EXPECT_FALSE(decoder.decode(header, *content, other, got) && got == page);
}

INSTANTIATE_TEST_SUITE_P(Sealed, DeltaFrame, testing::Bool());

// Families of pages that have much in common, some that are like no other, and
// what has no use for a base.
std::vector<PageBytes> families() {
  std::vector<PageBytes> pages;
  for (uint64_t member = 0; member < 30; ++member) {
    for (uint64_t family = 0; family < 20; ++family) pages.push_back(similar_page(family, member));
  }
  for (uint64_t i = 0; i < 40; ++i) {
    pages.push_back(random_page(1000 + i));
    pages.push_back(text_page(i));
    pages.push_back(zero_page());
  }
  return pages;
}

class DeltaImage : public testing::Test {
 protected:
  TempDirectory directory_;
  std::string path_ = directory_.file("a.img");
  std::vector<PageBytes> pages_ = families();

  void write(ImageWriterOptions options) {
    write_image(path_, pages_, {pages_.size()}, {}, std::move(options));
  }
  void write_deltas() {
    ImageWriterOptions options;
    options.deltas = true;
    write(std::move(options));
  }
  void expect_pages() {
    const auto image = ImageReader::open(path_).value();
    for (size_t i = 0; i < pages_.size(); ++i) {
      PageBytes page;
      const auto read = image->read_page(i, page);
      ASSERT_TRUE(read) << read.error().message();
      ASSERT_EQ(page, pages_[i]) << "page " << i;
    }
    const VerifyReport report = verify_image(path_).value();
    EXPECT_TRUE(report.ok()) << report.status().error().message();
  }
  // Of each page, where its frame is; and where the base of that is, or 0.
  struct Place {
    uint64_t frame = 0, base = 0;
  };
  std::vector<Place> places() {
    const auto image = ImageReader::open(path_).value();
    const ImageFile file = ImageFile::open(path_).value();
    std::vector<Place> found;
    for (size_t i = 0; i < pages_.size(); ++i) {
      const uint64_t bits = image->entry(i).value();
      const uint64_t frame = bits == 0 ? 0 : PageEntry::from_bits(bits).offset;
      found.push_back({frame, frame ? base_of_stored_page(file.own_frames(), frame).value() : 0});
    }
    return found;
  }
};

TEST_F(DeltaImage, IsSmallerAndReadsBack) {
  write({});
  EXPECT_EQ(ImageFile::open(path_)->header().incompatible, 0u);
  const auto alone = std::filesystem::file_size(path_);
  expect_pages();
  write_deltas();
  EXPECT_EQ(ImageFile::open(path_)->header().incompatible, layout::incompatible_deltas);
  EXPECT_LT(std::filesystem::file_size(path_), alone / 3);
  expect_pages();
}

TEST_F(DeltaImage, ABaseStandsAloneBeforeItsDeltas) {
  write_deltas();
  std::set<uint64_t> deltas, bases;
  for (const Place& place : places()) {
    if (place.base == 0) continue;
    EXPECT_LT(place.base, place.frame);
    deltas.insert(place.frame);
    bases.insert(place.base);
  }
  EXPECT_GT(deltas.size(), 500u);
  for (const uint64_t base : bases) EXPECT_FALSE(deltas.contains(base));
}

TEST_F(DeltaImage, OfSeveralThreadsReadsBack) {
  ImageWriterOptions options;
  options.deltas = true;
  options.similar_slots = 64;  // most is forgotten
  const Fd fd = open_file(path_, O_RDWR | O_CREAT).value();
  const ImageInfo info = info_of({pages_.size()});
  const auto writer = ImageWriter::create(fd.get(), path_, pages_.size(), options).value();
  std::vector<std::thread> threads;
  for (size_t first = 0; first < 4; ++first) {
    threads.emplace_back([&, first] {
      ImageWriter::Encoder encoder;
      for (size_t begin = first * 10; begin < pages_.size(); begin += 40) {
        std::vector<uint64_t> numbers;
        std::vector<PageBytes> some;
        for (size_t i = begin; i < std::min(begin + 10, pages_.size()); ++i) {
          numbers.push_back(i);
          some.push_back(pages_[i]);
        }
        ASSERT_TRUE(writer->write_pages(encoder, numbers, join(some)));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_TRUE(writer->finish(info, {}));
  expect_pages();
}

TEST_F(DeltaImage, ALostBaseLosesItsDeltasAndNothingElse) {
  write_deltas();
  const std::vector<Place> all = places();
  const uint64_t base = std::ranges::find_if(all, [](const Place& p) { return p.base != 0; })->base;
  const auto touched = std::ranges::count_if(
      all, [&](const Place& p) { return p.frame == base || p.base == base; });
  ASSERT_GT(touched, 10);
  auto bytes = read_file(path_);
  bytes.at(base + 100) ^= std::byte{1};
  write_file(path_, bytes);
  EXPECT_EQ(verify_image(path_)->damaged_pages, static_cast<uint64_t>(touched));
  const auto image = ImageReader::open(path_).value();
  for (size_t i = 0; i < all.size(); ++i) {
    PageBytes page;
    const bool lost = all[i].frame == base || all[i].base == base;
    ASSERT_EQ(static_cast<bool>(image->read_page(i, page)), !lost) << "page " << i;
    if (!lost) {
      ASSERT_EQ(page, pages_[i]);
    }
  }
}

// With the right checksum, as an attacker, or a defect of ours, would have it.
TEST_F(DeltaImage, ImpossibleBasesAreDamage) {
  write_deltas();
  const std::vector<Place> all = places();
  const auto delta =
      std::ranges::find_if(all.rbegin(), all.rend(), [](const Place& p) { return p.base != 0; });
  const auto other = std::ranges::find_if(all, [](const Place& p) { return p.base != 0; });
  ASSERT_NE(delta->frame, other->frame);
  const auto page = static_cast<size_t>(&*delta - all.data());
  const auto good = read_file(path_);
  for (const uint64_t base :
       {uint64_t{0}, uint64_t{4088}, delta->frame, delta->frame + 8, delta->base + 8, other->frame,
        uint64_t{good.size()}, ~uint64_t{0}, ~uint64_t{0} - 7}) {
    auto bytes = good;
    FrameEncoder::set_base(std::span(bytes).subspan(delta->frame), base);
    ImageForge(bytes).mend();
    write_file(path_, bytes);
    PageBytes out;
    const auto read = ImageReader::open(path_).value()->read_page(page, out);
    ASSERT_FALSE(read) << base;
    EXPECT_EQ(read.error().code(), ErrorCode::damaged) << read.error().message();
  }
}

// An older reader would not know what to do with them.
TEST_F(DeltaImage, AreAnnounced) {
  write_deltas();
  auto bytes = read_file(path_);
  ImageForge forge(bytes);
  auto header = forge.get<layout::Header>(0);
  header.incompatible = 0;
  forge.put(0, header);
  forge.mend();
  write_file(path_, bytes);
  const VerifyReport report = verify_image(path_).value();
  EXPECT_GT(report.other_damage.size(), 100u);
  EXPECT_EQ(report.damaged_pages, 0u);
}

}  // namespace
}  // namespace vmsnap
