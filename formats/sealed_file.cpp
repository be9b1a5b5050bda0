#include "formats/sealed_file.h"

#include <fcntl.h>
#include <sodium.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "formats/checksum.h"

namespace vmsnap {

namespace {

using layout::SealedPrelude;

constexpr size_t clear_chunk = layout::sealed_chunk;
constexpr size_t stored_chunk = clear_chunk + seal_tag_size;
constexpr size_t flush_size = 256 * stored_chunk;

// Chunks that are read at once, into a buffer on the stack.
constexpr uint64_t run_chunks = 8;

uint64_t stored_at(uint64_t chunk) { return sizeof(SealedPrelude) + chunk * stored_chunk; }

uint64_t last_chunk_of(uint64_t length) { return length == 0 ? 0 : (length - 1) / clear_chunk; }

// What a sealed file of this length takes.
uint64_t stored_length(uint64_t length) {
  return sizeof(SealedPrelude) + length + (last_chunk_of(length) + 1) * seal_tag_size;
}

std::span<const std::byte> prelude_bytes(const SealedPrelude& prelude) {
  return std::as_bytes(std::span(&prelude, 1));
}

uint64_t prelude_checksum(const SealedPrelude& prelude) {
  return checksum(prelude_bytes(prelude).first(offsetof(SealedPrelude, checksum)), 0);
}

// The associated data of all chunks but the last.
SealedPrelude without_length(SealedPrelude prelude) {
  prelude.length = 0;
  prelude.checksum = 0;
  return prelude;
}

SecretKey file_key(const SecretKey& master, const SealedPrelude& prelude) {
  return master.derive("manifest", prelude.id);
}

tl::unexpected<Error> bad_seal(const std::string& name, std::string_view what,
                               std::string_view remedy) {
  return tl::unexpected(
      Error(ErrorCode::damaged, fmt::format("{} {}", name, what)).with_remedy(std::string(remedy)));
}

constexpr std::string_view use_a_copy = "Use another copy of it, if there is one.";

Status check_prelude(const SealedPrelude& prelude, uint64_t file_length, const std::string& name) {
  if (prelude_checksum(prelude) != prelude.checksum) {
    return bad_seal(name, "is damaged: the checksum of its prelude does not match", use_a_copy);
  }
  if (prelude.version != layout::sealed_version) {
    return tl::unexpected(
        Error(ErrorCode::unsupported,
              fmt::format("{} has sealed-file version {}, newer than this vmsnap's {}", name,
                          prelude.version, layout::sealed_version))
            .with_remedy("Use a newer vmsnap."));
  }
  if (prelude.reserved0 != 0 ||
      std::ranges::any_of(prelude.reserved, [](uint8_t byte) { return byte != 0; })) {
    return bad_seal(name, "is damaged: its prelude uses reserved bytes", use_a_copy);
  }
  // The first comparison keeps the second from overflowing.
  if (prelude.length > file_length || stored_length(prelude.length) != file_length) {
    return bad_seal(name,
                    fmt::format("is damaged: it has {} bytes where {} bytes were sealed",
                                file_length, prelude.length),
                    use_a_copy);
  }
  return {};
}

}  // namespace

SealedSource::SealedSource(const std::string& path, RegularFile file,
                           const layout::SealedPrelude& prelude, SecretKey key)
    : ByteSource(path), file_(std::move(file)), prelude_(prelude), key_(std::move(key)) {}

Result<std::unique_ptr<SealedSource>> SealedSource::open(const std::string& path,
                                                         const SecretKey& master) {
  RegularFile file = VMSNAP_TRY(open_regular_file(path));
  SealedPrelude prelude = {};
  const uint64_t have = std::min<uint64_t>(file.size, sizeof prelude);
  VMSNAP_CHECK(read_exact_at(file.fd.get(),
                             std::as_writable_bytes(std::span(&prelude, 1)).first(have), 0, path));
  if (prelude.magic != layout::sealed_magic) {
    return bad_seal(path, "is not a sealed file of vmsnap", use_a_copy);
  }
  if (have < sizeof prelude) return bad_seal(path, "is cut short in its prelude", use_a_copy);
  VMSNAP_CHECK(check_prelude(prelude, file.size, path));
  std::unique_ptr<SealedSource> source(
      new SealedSource(path, std::move(file), prelude, file_key(master, prelude)));
  std::array<std::byte, stored_chunk> last;
  VMSNAP_CHECK(source->read_chunks(source->last_chunk(), last, 1));
  return source;
}

bool looks_sealed(const std::string& path) {
  std::array<char, 8> magic = {};
  const auto fd = open_file(path, O_RDONLY | O_NONBLOCK);
  return fd && read_exact_at(fd->get(), std::as_writable_bytes(std::span(magic)), 0, path) &&
         magic == layout::sealed_magic;
}

uint64_t SealedSource::last_chunk() const { return last_chunk_of(prelude_.length); }

// Decrypted where they are, with the tags between them.
Status SealedSource::read_chunks(uint64_t first, std::span<std::byte> buffer,
                                 uint64_t count) const {
  const uint64_t end = std::min(stored_at(first + count), file_.size);
  std::span<std::byte> stored = buffer.first(end - stored_at(first));
  VMSNAP_CHECK(read_exact_at(file_.fd.get(), stored, stored_at(first), name()));
  const SealedPrelude inner = without_length(prelude_);
  for (uint64_t chunk = first; chunk < first + count; ++chunk) {
    const std::span<std::byte> one = stored.first(std::min(stored.size(), stored_chunk));
    const SealedPrelude& associated = chunk == last_chunk() ? prelude_ : inner;
    if (!unseal(key_, chunk, prelude_bytes(associated), one.first(one.size() - seal_tag_size),
                one.last<seal_tag_size>())) {
      return bad_seal(name(),
                      fmt::format("is damaged: what is sealed from byte {} on is not authentic",
                                  chunk * clear_chunk),
                      "It was changed, or belongs to another store and its key; use another copy "
                      "of it, if there is one.");
    }
    stored = stored.subspan(one.size());
  }
  return {};
}

Status SealedSource::read_exact(uint64_t offset, std::span<std::byte> out) const {
  if (offset > size() || out.size() > size() - offset) {
    return bad_seal(name(), fmt::format("ends at byte {}: it is cut short", size()), use_a_copy);
  }
  std::array<std::byte, run_chunks * stored_chunk> buffer;
  while (!out.empty()) {
    const uint64_t first = offset / clear_chunk;
    const uint64_t needed = (offset + out.size() - 1) / clear_chunk - first + 1;
    const uint64_t count = std::min(needed, run_chunks);
    VMSNAP_CHECK(read_chunks(first, buffer, count));
    for (uint64_t i = 0; i < count; ++i) {
      const size_t skip = offset % clear_chunk;
      const size_t length = std::min(out.size(), clear_chunk - skip);
      std::memcpy(out.data(), buffer.data() + i * stored_chunk + skip, length);
      out = out.subspan(length);
      offset += length;
    }
  }
  return {};
}

SealedWriter::SealedWriter(int fd, std::string name, const SecretKey& master)
    : fd_(fd),
      name_(std::move(name)),
      prelude_([] {
        SealedPrelude prelude = {};
        prelude.magic = layout::sealed_magic;
        prelude.version = layout::sealed_version;
        ::randombytes_buf(prelude.id.data(), prelude.id.size());
        return prelude;
      }()),
      key_(file_key(master, prelude_)) {
  pending_.reserve(clear_chunk);
}

Status SealedWriter::append(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    // Only now is it known that the pending chunk is not the last.
    if (pending_.size() == clear_chunk) {
      seal_pending(prelude_);
      if (sealed_.size() >= flush_size) VMSNAP_CHECK(flush());
    }
    const auto some = bytes.first(std::min(bytes.size(), clear_chunk - pending_.size()));
    pending_.insert(pending_.end(), some.begin(), some.end());
    length_ += some.size();
    bytes = bytes.subspan(some.size());
  }
  return {};
}

void SealedWriter::seal_pending(const layout::SealedPrelude& associated) {
  const size_t length = pending_.size();
  const size_t begin = sealed_.size();
  sealed_.resize(begin + length + seal_tag_size);
  const std::span<std::byte> stored = std::span(sealed_).subspan(begin);
  std::ranges::copy(pending_, stored.begin());
  seal(key_, chunk_++, prelude_bytes(associated), stored.first(length),
       stored.last<seal_tag_size>());
  pending_.clear();
}

Status SealedWriter::flush() {
  VMSNAP_CHECK(write_all_at(fd_, sealed_, flushed_, name_));
  flushed_ += sealed_.size();
  sealed_.clear();
  return {};
}

Status SealedWriter::finish() {
  SealedPrelude prelude = prelude_;
  prelude.length = length_;
  prelude.checksum = prelude_checksum(prelude);
  seal_pending(prelude);
  VMSNAP_CHECK(flush());
  return write_all_at(fd_, prelude_bytes(prelude), 0, name_);
}

}  // namespace vmsnap
