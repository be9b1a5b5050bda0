// Any bytes as a sealed file: as they are; with length and checksum made right;
// and as what is sealed, which comes back as it was.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "formats/checksum.h"
#include "formats/sealed_file.h"

namespace vmsnap {
namespace {

class MemoryFile {
 public:
  explicit MemoryFile(std::span<const std::byte> bytes) {
    if (!fd_ || !write_all(fd_.get(), bytes, path_)) std::abort();
  }
  int fd() const { return fd_.get(); }
  const std::string& path() const { return path_; }

 private:
  const Fd fd_{::memfd_create("sealed", MFD_CLOEXEC)};
  const std::string path_ = "/proc/self/fd/" + std::to_string(fd_.get());
};

const SecretKey& fixed_key() {
  static const SecretKey key =
      SecretKey::from_bytes(std::array<uint8_t, SecretKey::size>{1, 2, 3}).value();
  return key;
}

void try_file(std::span<const std::byte> bytes) {
  const MemoryFile file(bytes);
  const auto source = SealedSource::open(file.path(), fixed_key());
  if (!source) return;
  const uint64_t size = (*source)->size();
  if (size >= bytes.size()) std::abort();
  std::vector<std::byte> out(size);
  (void)(*source)->read_exact(0, out);
  if (size > 0) (void)(*source)->read_exact(size - 1, std::span(out).first(1));
  if ((*source)->read_exact(1, out) && size > 0) std::abort();
}

// The prelude right in all that needs no key.
std::vector<std::byte> mended(std::span<const std::byte> input) {
  std::vector<std::byte> bytes(input.begin(), input.end());
  layout::SealedPrelude prelude = {};
  if (bytes.size() < sizeof prelude + seal_tag_size) bytes.resize(sizeof prelude + seal_tag_size);
  std::memcpy(&prelude, bytes.data(), sizeof prelude);
  prelude.magic = layout::sealed_magic;
  prelude.version = layout::sealed_version;
  prelude.reserved0 = 0;
  prelude.reserved = {};
  const uint64_t stored = bytes.size() - sizeof prelude;
  const uint64_t one = layout::sealed_chunk + seal_tag_size;
  prelude.length = stored - (stored + one - 1) / one * seal_tag_size;
  prelude.checksum = checksum(
      std::as_bytes(std::span(&prelude, 1)).first(offsetof(layout::SealedPrelude, checksum)), 0);
  std::memcpy(bytes.data(), &prelude, sizeof prelude);
  return bytes;
}

void round_trip(std::span<const std::byte> input) {
  const MemoryFile file({});
  SealedWriter writer(file.fd(), file.path(), fixed_key());
  const size_t half = input.size() / 2;
  if (!writer.append(input.first(half)) || !writer.append(input.subspan(half)) ||
      !writer.finish()) {
    std::abort();
  }
  const auto source = SealedSource::open(file.path(), fixed_key());
  if (!source || (*source)->size() != input.size()) std::abort();
  std::vector<std::byte> out(input.size());
  if (!(*source)->read_exact(0, out) || !std::ranges::equal(out, input)) std::abort();
  if (!(*source)->read_exact(half, std::span(out).subspan(half)) ||
      !std::ranges::equal(out, input)) {
    std::abort();
  }
}

}  // namespace
}  // namespace vmsnap

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto input = std::as_bytes(std::span(data, size));
  vmsnap::try_file(input);
  vmsnap::try_file(vmsnap::mended(input));
  vmsnap::round_trip(input);
  return 0;
}
