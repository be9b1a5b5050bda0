// Any bytes as the two files of an index: asked, and added to. Once as they
// are, and once as the sets of an index that is right in its header and length.
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "formats/file.h"
#include "formats/store/content_index.h"

namespace vmsnap {
namespace {

class IndexDirectory {
 public:
  IndexDirectory() {
    std::string name = std::filesystem::temp_directory_path() / "vmsnap-fuzz-XXXXXX";
    if (!::mkdtemp(name.data())) std::abort();
    paths_.root = name;
    for (const std::string& path : {paths_.index(), paths_.packs()}) {
      std::filesystem::create_directory(path);
    }
  }
  ~IndexDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(paths_.root, ignored);
  }
  const StorePaths& paths() const { return paths_; }

  void write(const char* suffix, std::span<const std::byte> bytes, uint64_t length) const {
    const std::string path = paths_.index() + "/name" + suffix;
    const Fd fd = open_file(path, O_WRONLY | O_CREAT | O_TRUNC).value();
    if (!write_all(fd.get(), bytes, path)) std::abort();
    if (::ftruncate(fd.get(), static_cast<off_t>(length)) < 0) std::abort();
  }

 private:
  StorePaths paths_;
};

bool finds(const StorePaths& paths, uint64_t hash, const layout::ImageId& pack, uint64_t offset) {
  const auto hints = ContentIndex::open(paths, "name").find(hash);
  if (hints.size() > 8) std::abort();
  return std::ranges::any_of(
      hints, [&](const auto& hint) { return hint.pack == pack && hint.offset == offset; });
}

void try_index(const StorePaths& paths, std::span<const std::byte> input) {
  const ContentIndex index = ContentIndex::open(paths, "name");
  for (size_t i = 0; i + sizeof(uint64_t) <= input.size() && i < 1024; i += sizeof(uint64_t)) {
    uint64_t hash;
    std::memcpy(&hash, input.data() + i, sizeof hash);
    if (index.find(hash).size() > 8) std::abort();
  }
  // Two of one set, and one of another. That it fails for damage is allowed.
  const layout::ImageId pack = {7};
  const layout::PackFrame frames[] = {{1, 4096}, {(uint64_t{1} << 40) + 1, 4120}, {99, 8192}};
  if (!ContentIndex::add(paths, "name", pack, frames)) return;
  for (const layout::PackFrame& frame : frames) {
    if (!finds(paths, frame.hash, pack, frame.offset)) std::abort();
  }
}

}  // namespace
}  // namespace vmsnap

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vmsnap;
  static const IndexDirectory directory;
  const auto input = std::as_bytes(std::span(data, size));
  // Packs first: their number, then as many ids as there are, then hints.
  const size_t packs = size == 0 ? 0 : std::min<size_t>(size - 1, size_t{data[0]} * 16);
  const auto ids = input.subspan(std::min<size_t>(1, size), packs);
  const auto hints = input.subspan(std::min<size_t>(1, size) + packs);
  directory.write(".packs", ids, ids.size());
  directory.write(".hints", hints, hints.size());
  try_index(directory.paths(), input);

  // magic, sets, hints added so far; then sets, the first in the first place.
  constexpr uint64_t sets = 4096;
  std::vector<std::byte> whole(4096);
  const uint64_t header[] = {0x0a315844494d5689, sets, hints.size() / 16 * 100};
  static_assert(sizeof header == 24);
  std::memcpy(whole.data(), header, sizeof header);
  whole.insert(whole.end(), hints.begin(), hints.end());
  directory.write(".packs", ids, ids.size());
  directory.write(".hints", whole, 4096 + sets * 128);
  try_index(directory.paths(), input);
  return 0;
}
