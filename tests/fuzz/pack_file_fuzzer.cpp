// Any bytes as a pack: everything is read and checked. Twice: as they are, and
// with all checksums made right, or nothing behind them would be reached.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "formats/file.h"
#include "formats/page_entry.h"
#include "formats/store/pack_check.h"
#include "tests/store/pack_forge.h"

namespace vmsnap {
namespace {

const SecretKey& fixed_master() {
  static const SecretKey key =
      SecretKey::from_bytes(std::array<uint8_t, SecretKey::size>{1, 2, 3}).value();
  return key;
}

void try_pack(std::span<const std::byte> bytes, const SecretKey* master) {
  const Fd fd(::memfd_create("pack", MFD_CLOEXEC));
  const std::string path = "/proc/self/fd/" + std::to_string(fd.get());
  if (!fd || !write_all(fd.get(), bytes, path)) std::abort();
  layout::ImageId id = {};
  constexpr size_t id_at = offsetof(layout::PackHeader, id);
  if (bytes.size() >= id_at + id.size()) std::memcpy(id.data(), bytes.data() + id_at, id.size());
  const auto pack = PackFile::open(path, id, master);
  if (!pack) return;

  std::vector<layout::PackFrame> table;
  if (const auto trailer = (*pack)->trailer()) {
    (void)(*pack)->segments(*trailer);
    if (auto read = (*pack)->frame_table(*trailer)) table = std::move(*read);
  }
  const bool with_table = !(*pack)->sealed() || master;
  const PackCheck check = check_open_pack(**pack, id, with_table, {});
  if (check.whole() != check.reasons.empty()) std::abort();
  if (check.lost_count > check.frames + table.size()) std::abort();
  // Of a pack with nothing wrong every frame has its right checksum, and is
  // where the table says.
  if (check.whole() && with_table && check.frames != table.size()) std::abort();
  std::array<std::byte, page_size> page;
  table.resize(std::min<size_t>(table.size(), 500));
  for (const layout::PackFrame& frame : table) {
    const PageEntry entry = {.slot = frame.hash % 16, .pack = 1, .offset = frame.offset % (1 << 20)};
    (void)read_stored_page((*pack)->frames(check.frames_end), entry.pack_bits(), page);
  }
}

}  // namespace
}  // namespace vmsnap

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto input = std::as_bytes(std::span(data, size));
  std::vector<std::byte> mended(input.begin(), input.end());
  vmsnap::PackForge(mended).mend(/*also_lengths=*/true);
  for (const vmsnap::SecretKey* master : {static_cast<const vmsnap::SecretKey*>(nullptr),
                                          &vmsnap::fixed_master()}) {
    vmsnap::try_pack(input, master);
    vmsnap::try_pack(mended, master);
  }
  return 0;
}
