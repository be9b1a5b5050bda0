// The search for QEMU's list of RAM blocks, in memory that looks like it.
#include "snap/vmm/ram_block_finder.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

namespace vmsnap {
namespace {

constexpr uint64_t length = 1 << 20;

class RamBlockFinder : public testing::Test {
 protected:
  // Private memory of this process, a mebibyte.
  RemotePtr map() {
    void* memory = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(memory, MAP_FAILED);
    const RemotePtr start(reinterpret_cast<uint64_t>(memory));
    mappings_.push_back({.range = {start, length}, .readable = true, .writable = true});
    return start;
  }
  void TearDown() override {
    for (const Mapping& mapping : mappings_) {
      ::munmap(reinterpret_cast<void*>(mapping.range.start.address()), mapping.range.length);
    }
  }

  // What QEMU 7.2 has of a block: the host address two words before the offset.
  static void describe(RemotePtr at, const RamBlockLine& line, RemotePtr host) {
    const uint64_t words[] = {host.address(), 0, line.offset, line.used, line.total, 0};
    auto* place = reinterpret_cast<char*>(at.address());
    std::memcpy(place, words, sizeof words);
    std::memcpy(place + sizeof words, line.name.c_str(), line.name.size() + 1);
  }

  Result<std::map<std::string, RemotePtr>> find() {
    const Process process = Process::open(::getpid()).value();
    return find_block_hosts(process, mappings_, {ram_, rom_}, known_);
  }

  void expect_both() {
    const auto hosts = find();
    ASSERT_TRUE(hosts) << hosts.error().message();
    EXPECT_EQ(hosts->at("pc.ram"), ram_host_);
    EXPECT_EQ(hosts->at("vga.rom"), rom_host_);
  }

  const RamBlockLine ram_ = {.name = "pc.ram", .offset = 0, .used = length, .total = length};
  const RamBlockLine rom_ = {.name = "vga.rom", .offset = length, .used = 0x10000, .total = 0x10000};
  const RemotePtr rom_host_{0x7f0000400000};
  std::vector<Mapping> mappings_;
  const RemotePtr ram_host_ = map(), heap_ = map();
  const KnownHosts known_ = {{"pc.ram", ram_host_}};
};

TEST_F(RamBlockFinder, IsCalibratedOnWhatIsKnown) {
  describe(heap_ + 4096, ram_, ram_host_);
  describe(heap_ + 70000 * 8, rom_, rom_host_);
  expect_both();
}

TEST_F(RamBlockFinder, DoesNotBelieveTheGuest) {
  describe(heap_ + 4096, ram_, ram_host_);
  describe(heap_ + 8192, rom_, rom_host_);
  for (const uint64_t at : {uint64_t{0}, uint64_t{4096}, length - 4096}) {
    describe(ram_host_ + at + 64, rom_, rom_host_ + 4096);
  }
  expect_both();
}

TEST_F(RamBlockFinder, RefusesTwoAddresses) {
  describe(heap_ + 4096, ram_, ram_host_);
  describe(heap_ + 8192, rom_, rom_host_);
  describe(heap_ + 12288, rom_, rom_host_ + 4096);
  EXPECT_EQ(find().error().code(), ErrorCode::refused);
}

TEST_F(RamBlockFinder, RefusesWhatItCannotFind) {
  EXPECT_EQ(find().error().code(), ErrorCode::refused);
  describe(heap_ + 4096, ram_, ram_host_);
  const auto hosts = find();
  ASSERT_FALSE(hosts);
  EXPECT_NE(hosts.error().message().find("'vga.rom'"), std::string::npos);
}

}  // namespace
}  // namespace vmsnap
