#include "restore/guest_ram.h"

#include <gtest/gtest.h>

namespace vmsnap {
namespace {

const std::vector<Region> regions = {{"pc.ram", 0, 0x8000, 0}, {"vga.vram", 0xfd000000, 0x4000, 8}};

RamBlock block(const char* name, uint64_t host, uint64_t length) {
  return {name, RemotePtr(host), length, 0};
}

std::string error_of(const std::vector<RamBlock>& blocks) {
  const auto matched = match_blocks(regions, blocks);
  return matched ? "" : matched.error().message();
}

TEST(MatchBlocks, InTheImagesOrder) {
  const auto matched = match_blocks(
      regions, {block("vga.vram", 0x200000, 0x4000), block("pc.ram", 0x100000, 0x8000)});
  ASSERT_TRUE(matched);
  ASSERT_EQ(matched->size(), 2u);
  EXPECT_EQ((*matched)[0].name, "pc.ram");
  EXPECT_EQ((*matched)[0].range.start, RemotePtr(0x100000));
  EXPECT_EQ((*matched)[1].range.length, 0x4000u);
  EXPECT_EQ((*matched)[1].first_page, 8u);
}

TEST(MatchBlocks, TheNamesOfBackendsDifferByVersion) {
  EXPECT_EQ(
      error_of({block("/objects/pc.ram", 0x100000, 0x8000), block("vga.vram", 0x200000, 0x4000)}),
      "");
}

TEST(MatchBlocks, AnotherMachineIsNamed) {
  const std::string start = "the VM that was started is not the machine of the image: ";
  EXPECT_EQ(error_of({block("pc.ram", 0x100000, 0x8000)}),
            start + "it has no memory block 'vga.vram' (16384 bytes)");
  EXPECT_EQ(error_of({block("pc.ram", 0x100000, 0x9000), block("vga.vram", 0x200000, 0x4000)}),
            start + "its memory block 'pc.ram' has 36864 bytes, the image 32768");
  EXPECT_EQ(error_of({block("pc.ram", 0x100000, 0x8000), block("vga.vram", 0x200000, 0x4000),
                      block("rom", 0x300000, 0x1000)}),
            start + "the image has no memory block 'rom' (4096 bytes)");
}

}  // namespace
}  // namespace vmsnap
