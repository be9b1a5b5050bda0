// A file that only the holder of a key can read, and that nobody else can
// change unnoticed: byte for byte, in its order, in its length, as a whole.
//
//   prelude, 64 bytes, clear | chunk 0 | chunk 1 | ... | last chunk
//
// A chunk is 4096 bytes, encrypted, and a tag of 16; the last one may have any
// length up to that, and is there (empty) in an empty file too. Chunk k is
// sealed (formats/seal.h) at place k with a key derived from the master key and
// the file's id, so that a chunk can be neither moved nor taken from another
// file. The associated data of the last chunk is the prelude, which has the
// length; that of the others is the prelude without length and checksum, which
// are not known yet while they are written. So the last chunk vouches for the
// prelude and for its being the last.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "formats/byte_sink.h"
#include "formats/byte_source.h"
#include "formats/seal.h"
#include "formats/secret_key.h"

namespace vmsnap {

namespace layout {

static_assert(std::endian::native == std::endian::little, "structures are copied as they are");

inline constexpr uint32_t sealed_version = 1;
inline constexpr size_t sealed_chunk = 4096;
inline constexpr std::array<char, 8> sealed_magic = {'\x89', 'V', 'M', 'S', 'E', 'A', 'L', '\n'};

// At offset 0. Magic, version and checksum stay where they are in all versions.
struct SealedPrelude {
  std::array<char, 8> magic;
  uint32_t version;
  uint32_t reserved0;                // must be zero
  std::array<uint8_t, 16> id;        // random
  uint64_t length;                   // of what is sealed
  std::array<uint8_t, 16> reserved;  // must be zero
  uint64_t checksum;                 // of all before it, seed 0: finds damage without the key
};
static_assert(sizeof(SealedPrelude) == 64 && std::is_trivially_copyable_v<SealedPrelude>);

}  // namespace layout

// The bytes that were sealed, at any place. Memory: none but the object.
class SealedSource final : public ByteSource {
 public:
  // ErrorCode::damaged for what is not a whole sealed file, or was not sealed
  // with this master key; ErrorCode::unsupported for a newer version. Reads the
  // prelude and the last chunk: afterwards the id and length are authentic.
  static Result<std::unique_ptr<SealedSource>> open(const std::string& path,
                                                    const SecretKey& master);

  // Nothing that is not authentic is ever in `out` after success; after an
  // error `out` may hold a part of the bytes.
  Status read_exact(uint64_t offset, std::span<std::byte> out) const override;
  uint64_t size() const override { return prelude_.length; }

 private:
  SealedSource(const std::string& path, RegularFile file, const layout::SealedPrelude& prelude,
               SecretKey key);

  uint64_t last_chunk() const;
  Status read_chunks(uint64_t first, std::span<std::byte> buffer, uint64_t count) const;

  const RegularFile file_;
  const layout::SealedPrelude prelude_;
  const SecretKey key_;
};

// Whether the file begins as one, for who has no key. False if it cannot be read.
bool looks_sealed(const std::string& path);

// Writes a sealed file front to back.
class SealedWriter final : public ByteSink {
 public:
  // `fd` is borrowed: an empty file, open for writing. `master` is not kept.
  SealedWriter(int fd, std::string name, const SecretKey& master);

  Status append(std::span<const std::byte> bytes) override;
  uint64_t offset() const override { return length_; }
  // Writes the last chunk and then the prelude; until then there is no sealed
  // file. After it, or any error, the writer must not be used again.
  Status finish() override;

 private:
  void seal_pending(const layout::SealedPrelude& associated);
  Status flush();

  const int fd_;
  const std::string name_;
  layout::SealedPrelude prelude_ = {};
  const SecretKey key_;
  uint64_t length_ = 0;
  uint64_t chunk_ = 0;              // the number of the pending one
  std::vector<std::byte> pending_;  // clear, one chunk at most
  std::vector<std::byte> sealed_;   // not yet in the file
  uint64_t flushed_ = sizeof(layout::SealedPrelude);
};

}  // namespace vmsnap
