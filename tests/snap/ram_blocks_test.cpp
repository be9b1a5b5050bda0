// What QEMU prints, as it printed it: 7.2 as Debian ships it, and the form of
// newer ones with host addresses.
#include "snap/vmm/ram_blocks.h"

#include <gtest/gtest.h>

namespace vmsnap {
namespace {

TEST(InfoRamblock, ReadsQemu72) {
  const auto blocks = parse_info_ramblock(
      "              Block Name    PSize              Offset               Used              Total\n"
      "                      m1    4 KiB  0x0000000000000000 0x0000000140000000 0x0000000140000000\n"
      "    /rom@etc/acpi/tables    4 KiB  0x0000000141100000 0x0000000000020000 0x0000000000200000\n"
      "           name with gap    2 MiB  0x0000000180000000 0x0000000000200000 0x0000000000200000\n");
  ASSERT_TRUE(blocks) << blocks.error().message();
  ASSERT_EQ(blocks->size(), 3u);
  EXPECT_EQ((*blocks)[0].name, "m1");
  EXPECT_EQ((*blocks)[0].used, 0x140000000u);
  EXPECT_EQ((*blocks)[0].host, 0u);
  EXPECT_EQ((*blocks)[1].name, "/rom@etc/acpi/tables");
  EXPECT_EQ((*blocks)[1].offset, 0x141100000u);
  EXPECT_EQ((*blocks)[1].used, 0x20000u);
  EXPECT_EQ((*blocks)[1].total, 0x200000u);
  EXPECT_EQ((*blocks)[2].name, "name with gap");
}

TEST(InfoRamblock, ReadsHostAddressesOfNewerOnes) {
  const auto blocks = parse_info_ramblock(
      "              Block Name    PSize              Offset               Used              Total"
      "                HVA  RO\n"
      "                  pc.ram    4 KiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 "
      "0x00007f8dfbe00000  rw\n");
  ASSERT_TRUE(blocks) << blocks.error().message();
  EXPECT_EQ(blocks->at(0).host, 0x7f8dfbe00000u);
}

TEST(InfoRamblock, RefusesWhatIsNotOne) {
  EXPECT_EQ(parse_info_ramblock("").error().message(), "QEMU's 'info ramblock' lists no RAM");
  EXPECT_EQ(parse_info_ramblock("  pc.ram  4 KiB 0x0 0xzz 0x1\n").error().code(), ErrorCode::vm);
  // More used than there is.
  EXPECT_FALSE(parse_info_ramblock("  pc.ram  4 KiB 0x0 0x2000 0x1000\n"));
}

TEST(InfoMtree, TakesRamOfTheMemoryViewOnly) {
  const auto ranges = parse_info_mtree(
      "FlatView #0\n"
      " AS \"I/O\", root: io\n"
      "  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan\n"
      "\n"
      "FlatView #1\n"
      " AS \"memory\", root: system\n"
      " AS \"cpu-memory-0\", root: system\n"
      "  0000000000000000-000000000009ffff (prio 0, ram): pc.ram kvm\n"
      "  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\n"
      "  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000 kvm\n"
      "  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios\n"
      "  0000000100000000-000000017fffffff (prio 0, ram): pc.ram @00000000c0000000\n"
      "FlatView #2\n"
      " AS \"cpu-smm-0\", root: memory\n"
      "  0000000000000000-00000000000bffff (prio 0, ram): other\n");
  ASSERT_TRUE(ranges) << ranges.error().message();
  ASSERT_EQ(ranges->size(), 4u);
  EXPECT_EQ((*ranges)[0].block, "pc.ram");
  EXPECT_EQ((*ranges)[0].length, 0xa0000u);
  EXPECT_EQ((*ranges)[1].offset, 0xc0000u);
  EXPECT_EQ((*ranges)[1].block, "pc.ram");
  EXPECT_EQ((*ranges)[2].block, "pc.bios");
  EXPECT_EQ((*ranges)[3].start, 0x100000000u);
  EXPECT_EQ((*ranges)[3].offset, 0xc0000000u);
  EXPECT_FALSE(parse_info_mtree("No flat views\n"));
}

}  // namespace
}  // namespace vmsnap
