// Damaged, foreign and forged files: never a crash, never wrong bytes.
#include <csignal>
#include <cstdlib>
#include <functional>
#include <string_view>

#include "formats/digest.h"
#include "formats/image_layout.h"
#include "formats/interrupt.h"
#include "formats/page_entry.h"
#include "formats/verify.h"
#include "tests/formats/image_forge.h"
#include "tests/formats/test_image.h"

namespace vmsnap {
namespace {

const std::vector<PageBytes>& small_pages() {
  static const std::vector<PageBytes> pages = {text_page(1), zero_page(), text_page(2),
                                               random_page(3), text_page(1)};
  return pages;
}

class DamageTest : public testing::Test {
 protected:
  DamageTest() : path_(directory_.file("a.img")) {
    write_image(path_, small_pages(), {2, 700}, some_state(500));
    original_ = read_file(path_);
  }

  // Reads everything; whatever is read without an error must be right.
  void expect_no_wrong_bytes() const {
    const auto image = ImageReader::open(path_);
    if (!image) return;
    PageBytes bytes;
    for (uint64_t page = 0; page < (*image)->page_count(); ++page) {
      if (page == 10) page = 690;  // 680 zero pages that say nothing new
      const auto kind = (*image)->read_page(page, bytes);
      if (!kind) continue;
      if (page >= small_pages().size()) {
        ASSERT_EQ(*kind, PageKind::zero);
      } else {
        ASSERT_EQ(bytes, small_pages()[page]);
      }
    }
    const auto state = (*image)->device_state();
    if (state) {
      ASSERT_EQ(*state, some_state(500));
    }
    ASSERT_EQ((*image)->info().regions.size(), 2u);
  }

  bool verify_finds_damage() const {
    const auto report = verify_image(path_);
    return !report || !report->ok();
  }

  Error open_error() const {
    const auto image = ImageReader::open(path_);
    return image ? Error(ErrorCode::io, "it opened") : image.error();
  }

  // The image with something changed in it, checksums made right again.
  void forge(const std::function<void(ImageForge&)>& change) {
    std::vector<std::byte> bytes = original_;
    ImageForge forge(bytes);
    change(forge);
    forge.mend();
    write_file(path_, bytes);
  }

  void forge_trailer(const std::function<void(layout::Trailer&)>& change) {
    forge([&](ImageForge& image) {
      auto trailer = image.get<layout::Trailer>(image.trailer_offset());
      change(trailer);
      image.put(image.trailer_offset(), trailer);
    });
  }

  layout::Trailer trailer() {
    return ImageForge(original_).get<layout::Trailer>(original_.size() - layout::block_size);
  }

  TempDirectory directory_;
  const std::string path_;
  std::vector<std::byte> original_;
};

TEST_F(DamageTest, ForgingNothingChangesNothing) {
  forge([](ImageForge&) {});
  EXPECT_EQ(read_file(path_), original_);
  EXPECT_FALSE(verify_finds_damage());
}

// One file, one byte changed in place at a time.
TEST_F(DamageTest, EveryFlippedByteIsFound) {
  const Fd fd = open_file(path_, O_RDWR).value();
#ifdef __SANITIZE_THREAD__
  constexpr size_t step = 7;  // it looks for races, here are none, and all would take a minute
#else
  constexpr size_t step = 1;
#endif
  for (size_t i = 0; i < original_.size(); i += step) {
    const std::byte flipped = original_[i] ^ std::byte(1 << i % 8);
    ASSERT_TRUE(write_all_at(fd.get(), std::span(&flipped, 1), i, path_));
    ASSERT_TRUE(verify_finds_damage()) << "byte " << i;
    ASSERT_NO_FATAL_FAILURE(expect_no_wrong_bytes()) << "byte " << i;
    ASSERT_TRUE(write_all_at(fd.get(), std::span(&original_[i], 1), i, path_));
  }
  EXPECT_FALSE(verify_finds_damage());
}

TEST_F(DamageTest, TruncatedAtEveryLength) {
  for (size_t length = original_.size(); length-- > 0;) {
    std::filesystem::resize_file(path_, length);
    const Error error = open_error();
    ASSERT_EQ(error.code(), ErrorCode::damaged) << length;
    const char* expected =
        length < 8 ? " is not a vmsnap image" : " is cut short: it does not end as an image does";
    ASSERT_EQ(error.message(), path_ + expected) << length;
  }
}

TEST_F(DamageTest, Extended) {
  std::vector<std::byte> bytes = original_;
  bytes.resize(bytes.size() + 4096);
  write_file(path_, bytes);
  EXPECT_EQ(open_error().code(), ErrorCode::damaged);
  bytes = original_;
  bytes.insert(bytes.end(), original_.end() - 4096, original_.end());  // a second trailer
  write_file(path_, bytes);
  EXPECT_EQ(open_error().code(), ErrorCode::damaged);
}

TEST_F(DamageTest, Garbage) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    write_file(path_, join({random_page(seed), random_page(seed + 1), random_page(seed + 2)}));
    EXPECT_EQ(open_error().code(), ErrorCode::damaged);
    EXPECT_EQ(open_error().message(), path_ + " is not a vmsnap image");
  }
  EXPECT_EQ(ImageReader::open("/").error().message(), "/ is not a regular file");
  EXPECT_EQ(ImageReader::open("/nowhere/a.img").error().message(),
            "cannot open /nowhere/a.img: No such file or directory");
}

TEST_F(DamageTest, GarbageBehindEveryChecksum) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 3000; ++round) {
    forge([&](ImageForge& image) {
      // In the trailer's fields, the tree, or the frames.
      const uint64_t areas[] = {image.trailer_offset() + 12, trailer().root.offset - 8192,
                                layout::frames_begin};
      image.put(areas[round % 3] + random() % (round % 3 == 0 ? 700 : 4000),
                static_cast<uint8_t>(random()));
    });
    const auto image = ImageReader::open(path_);
    PageBytes bytes;
    for (uint64_t page = 0; image && page < std::min<uint64_t>((*image)->page_count(), 20);
         ++page) {
      (void)(*image)->read_page(page, bytes);
    }
    if (image) (void)(*image)->next_data_page(0);
    (void)verify_image(path_);
  }
}

TEST_F(DamageTest, VerifyNamesTheDamagedPages) {
  // The first frame, which pages 0 and 4 share, is the only one to be changed.
  std::vector<std::byte> bytes = original_;
  bytes[layout::frames_begin + 20] ^= std::byte{1};
  write_file(path_, bytes);
  int last_percent = -1;
  const VerifyReport report = verify_image(path_, [&](int percent) {
                                EXPECT_GT(percent, last_percent);
                                last_percent = percent;
                              }).value();
  EXPECT_EQ(last_percent, 100);
  EXPECT_EQ(report.damaged_pages, 2u);
  EXPECT_EQ(report.data_pages, 2u);
  EXPECT_EQ(report.zero_pages, 698u);
  ASSERT_EQ(report.damaged.size(), 2u);
  EXPECT_EQ(report.damaged[0].region, "region0");
  EXPECT_EQ(report.damaged[0].offset, 0u);
  EXPECT_EQ(report.damaged[1].region, "region1");
  EXPECT_EQ(report.damaged[1].offset, 2 * page_size);
  EXPECT_EQ(report.damaged[1].reason,
            path_ + " is damaged: the checksum of the page frame at byte 4096 does not match");
  EXPECT_EQ(report.status().error().code(), ErrorCode::damaged);
  EXPECT_EQ(report.status().error().message(),
            path_ +
                " is damaged: 2 of its 702 pages cannot be read back, first the one at offset "
                "0x0 of region region0");
}

// In a process of its own, because the signal stays noted.
TEST_F(DamageTest, VerifyHeedsASignal) {
  const auto verify_after_a_signal = [&] {
    install_interrupt_handlers();
    std::raise(SIGINT);
    const auto report = verify_image(path_);
    std::_Exit(!report && report.error().code() == ErrorCode::interrupted ? 0 : 1);
  };
  EXPECT_EXIT(verify_after_a_signal(), testing::ExitedWithCode(0), "");
}

TEST_F(DamageTest, DamagedTreeLosesItsPages) {
  std::vector<std::byte> bytes = original_;
  const uint64_t first_leaf = layout::align_up(trailer().frames_end, layout::block_size);
  bytes[first_leaf] ^= std::byte{1};
  write_file(path_, bytes);
  const VerifyReport report = verify_image(path_).value();
  EXPECT_EQ(report.damaged_pages, 512u);
  ASSERT_EQ(report.damaged.size(), 2u);  // split where the regions are
  EXPECT_EQ(report.damaged[0].page_count, 2u);
  EXPECT_EQ(report.damaged[1].page_count, 510u);
  const auto image = ImageReader::open(path_).value();
  PageBytes page;
  EXPECT_EQ(image->read_page(0, page).error().code(), ErrorCode::damaged);
  EXPECT_EQ(image->page_kind(511).error().code(), ErrorCode::damaged);
  EXPECT_EQ(image->read_page(512, page).value(), PageKind::zero);
  EXPECT_EQ(image->next_data_page(0).error().code(), ErrorCode::damaged);
}

TEST_F(DamageTest, NewerVersionIsUnsupported) {
  forge([](ImageForge& image) {
    auto header = image.get<layout::Header>(0);
    header.version = 2;
    image.put(0, header);
  });
  const Error error = open_error();
  EXPECT_EQ(error.code(), ErrorCode::unsupported);
  EXPECT_EQ(error.message(), path_ + " has image format version 2, newer than this vmsnap's 1");
  EXPECT_EQ(error.remedy(), "Use a newer vmsnap.");
}

TEST_F(DamageTest, FeatureBits) {
  const auto with_bits = [&](uint64_t incompatible, uint64_t compatible) {
    forge([&](ImageForge& image) {
      auto header = image.get<layout::Header>(0);
      header.incompatible = incompatible;
      header.compatible = compatible;
      image.put(0, header);
    });
  };
  with_bits(0, 1u << 5);
  EXPECT_FALSE(verify_finds_damage());
  with_bits(1u << 5, 0);
  EXPECT_EQ(open_error().code(), ErrorCode::unsupported);
  EXPECT_EQ(open_error().message(), path_ + " uses image features that this vmsnap lacks (0x20)");
}

TEST_F(DamageTest, ReservedBytesMustBeZero) {
  forge([](ImageForge& image) { image.put(2000, uint8_t{1}); });
  EXPECT_EQ(open_error().message(), path_ + " is damaged: its header uses reserved bytes");
  forge_trailer([](layout::Trailer& t) { t.reserved[3000] = 1; });
  EXPECT_EQ(open_error().message(), path_ + " is damaged: its trailer uses reserved bytes");
  forge_trailer([](layout::Trailer& t) { t.sections[9].raw_length = 1; });
  EXPECT_EQ(open_error().message(), path_ + " is damaged: its trailer uses reserved bytes");

  // In a frame, and past the last page in a leaf.
  forge([](ImageForge& image) { image.put(layout::frames_begin + 3, uint8_t{1}); });
  EXPECT_TRUE(verify_finds_damage());
  PageBytes page;
  EXPECT_EQ(ImageReader::open(path_).value()->read_page(0, page).error().message(),
            path_ + " is damaged: the page frame at byte 4096 has an impossible header");
  write_image(path_, small_pages(), {2, 3});
  original_ = read_file(path_);
  forge([&](ImageForge& image) {
    image.put(trailer().root.offset + 5 * 8, image.get<uint64_t>(trailer().root.offset));
  });
  EXPECT_EQ(ImageReader::open(path_).value()->read_page(0, page).error().message(),
            path_ + " is damaged: page-tree block 0 of level 1 uses reserved bytes");
}

TEST_F(DamageTest, SectionsOfLaterVersions) {
  const auto with_section = [&](uint16_t flags) {
    forge_trailer([&](layout::Trailer& t) {
      t.sections[2] = {.type = 77, .codec = 9, .flags = flags, .offset = t.sections[1].offset + 8};
    });
  };
  with_section(0);
  EXPECT_EQ(open_error().message(), "it opened");
  with_section(layout::section_must_understand);
  EXPECT_EQ(open_error().code(), ErrorCode::unsupported);
  forge_trailer([](layout::Trailer& t) { t.sections[2] = t.sections[1]; });
  EXPECT_EQ(open_error().message(), path_ + " is damaged: it has two metadata sections");
  forge_trailer([](layout::Trailer& t) { t.sections[1] = {}; });
  EXPECT_EQ(open_error().message(), path_ + " is damaged: it has no metadata");
  forge_trailer(
      [](layout::Trailer& t) { t.sections[0].raw_length = layout::max_device_state + 1; });
  EXPECT_EQ(open_error().code(), ErrorCode::damaged);
  forge_trailer([](layout::Trailer& t) { t.sections[0].stored_length = ~uint64_t{0} - 8; });
  EXPECT_EQ(open_error().message(),
            path_ + " is damaged: its device state section is not inside the file");
  forge_trailer([](layout::Trailer& t) { --t.sections[0].raw_length; });
  EXPECT_EQ(ImageReader::open(path_).value()->device_state().error().message(),
            path_ + " is damaged: its device state section does not decompress");
  EXPECT_TRUE(verify_finds_damage());
}

TEST_F(DamageTest, EntriesThatPointNowhere) {
  const uint64_t leaf = layout::align_up(trailer().frames_end, layout::block_size);
  const uint64_t end_mark = trailer().frames_end - sizeof(layout::FrameHeader);
  const PageEntry forged[] = {
      {.offset = 0},
      {.offset = 4088},
      {.offset = end_mark},
      {.offset = leaf},
      {.offset = (uint64_t{1} << 43) - 8},
      {.offset = 4096 + 8},
      {.slot = 1, .offset = 4096},
      {.pack = 1, .offset = 4096},
      {.kind = 0, .offset = 4096},
      {.kind = 2, .offset = 4096},
  };
  for (const PageEntry& entry : forged) {
    // After the mending, which would make a frame's checksum right there.
    std::vector<std::byte> bytes = original_;
    ImageForge image(bytes);
    image.put(leaf, entry.pack_bits());
    const std::vector<std::byte> frames(bytes.begin(), bytes.begin() + static_cast<long>(leaf));
    image.mend();
    std::copy(frames.begin(), frames.end(), bytes.begin());
    write_file(path_, bytes);
    PageBytes page;
    const auto kind = ImageReader::open(path_).value()->read_page(0, page);
    ASSERT_FALSE(kind) << entry.pack_bits();
    EXPECT_EQ(kind.error().code(), ErrorCode::damaged);
    EXPECT_TRUE(verify_finds_damage());
  }
}

// Every fast checksum is right again, and yet it is not what was written.
TEST_F(DamageTest, TheDigestSeesWhatChecksumsDoNot) {
  write_image(path_, {text_page(1), text_page(2)}, {2});
  original_ = read_file(path_);
  forge([&](ImageForge& image) {
    auto t = image.get<layout::Trailer>(image.trailer_offset());
    for (const layout::Section& section : t.sections) {
      if (section.type == static_cast<uint32_t>(layout::SectionType::digest)) {
        image.put(section.offset, static_cast<uint8_t>(image.get<uint8_t>(section.offset) ^ 1));
      }
    }
  });
  const auto report = verify_image(path_).value();
  ASSERT_FALSE(report.ok());
  EXPECT_NE(report.status().error().message().find("digest"), std::string::npos);
  EXPECT_EQ(report.damaged_pages, 0u);
}

// The format allows 16 pages a frame, although nobody writes that yet.
TEST_F(DamageTest, FramesOfSeveralPages) {
  std::vector<PageBytes> pages;
  for (uint64_t i = 0; i < 16; ++i) pages.push_back(random_page(100 + i));
  write_image(path_, pages, {16});
  original_ = read_file(path_);
  const auto raw = join(pages);
  const uint64_t leaf = trailer().root.offset;
  const uint64_t mark = trailer().frames_end - sizeof(layout::FrameHeader);
  // One frame of 16 raw pages is shorter than 16 frames; the end mark moves.
  forge([&](ImageForge& image) {
    const layout::FrameHeader header = {.codec = layout::codec_raw,
                                        .last_slot = 15,
                                        .stored_length = static_cast<uint32_t>(raw.size())};
    image.put(layout::frames_begin, header);
    for (size_t i = 0; i < raw.size(); ++i) {
      image.put(layout::frames_begin + sizeof header + i, raw[i]);
    }
    const uint64_t end = layout::frames_begin + sizeof header + raw.size();
    image.put(end, image.get<layout::FrameHeader>(mark));
    for (uint64_t at = end + sizeof header; at < leaf; ++at) image.put(at, uint8_t{0});
    for (uint64_t slot = 0; slot < 16; ++slot) {
      image.put(leaf + slot * 8, PageEntry{.slot = slot, .offset = 4096}.pack_bits());
    }
    auto t = image.get<layout::Trailer>(image.trailer_offset());
    t.frames_end = end + sizeof header;
    // Its digest is no longer right: this image has none.
    for (layout::Section& section : t.sections) {
      if (section.type == static_cast<uint32_t>(layout::SectionType::digest)) {
        for (size_t i = 0; i < sizeof(Digest); ++i) image.put(section.offset + i, uint8_t{0});
        section = {};
      }
    }
    image.put(image.trailer_offset(), t);
  });

  const auto image = ImageReader::open(path_).value();
  PageBytes page;
  for (uint64_t i = 0; i < 16; ++i) {
    const auto kind = image->read_page(i, page);
    ASSERT_TRUE(kind) << kind.error().message();
    EXPECT_EQ(page, pages[i]);
  }
  const auto report = verify_image(path_).value();
  EXPECT_TRUE(report.ok()) << report.status().error().message();
}

}  // namespace
}  // namespace vmsnap
