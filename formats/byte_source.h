// Bytes at rest that are read at any place: a plain file, or one that has to
// be decrypted on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "formats/error.h"
#include "formats/file.h"

namespace vmsnap {

// All members: any number of threads; read_exact() blocks on the disk.
class ByteSource {
 public:
  virtual ~ByteSource() = default;

  // All of `out` from `offset` on; ErrorCode::damaged where the bytes end
  // before that, or are not what was written.
  virtual Status read_exact(uint64_t offset, std::span<std::byte> out) const = 0;

  virtual uint64_t size() const = 0;  // bytes
  virtual const std::string& name() const = 0;  // the file, for errors
};

// A regular file as it is. Read with pread(2), never mapped, so that a failing
// disk or a file cut short is an error value and not a signal.
class PlainSource : public ByteSource {
 public:
  // ErrorCode::damaged if `path` is not a regular file.
  static Result<std::unique_ptr<PlainSource>> open(const std::string& path);

  Status read_exact(uint64_t offset, std::span<std::byte> out) const override;
  uint64_t size() const override { return size_; }
  const std::string& name() const override { return name_; }
  int fd() const { return fd_.get(); }

 private:
  PlainSource(Fd fd, std::string name, uint64_t size)
      : fd_(std::move(fd)), name_(std::move(name)), size_(size) {}

  Fd fd_;
  std::string name_;
  uint64_t size_;
};

}  // namespace vmsnap
