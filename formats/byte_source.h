// Bytes at rest that are read at any place: a plain file, or a sealed one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "formats/error.h"
#include "formats/file.h"

namespace vmsnap {

// Any number of threads may read at the same time. Reading blocks on the disk.
class ByteSource {
 public:
  explicit ByteSource(std::string name) : name_(std::move(name)) {}
  virtual ~ByteSource() = default;
  ByteSource(const ByteSource&) = delete;
  ByteSource& operator=(const ByteSource&) = delete;

  // All of `out`, from `offset`. Bytes beyond the end are ErrorCode::damaged:
  // whoever asks for them has been told a length that the file does not keep.
  virtual Status read_exact(uint64_t offset, std::span<std::byte> out) const = 0;
  virtual uint64_t size() const = 0;  // when it was opened

  const std::string& name() const { return name_; }  // for errors

 private:
  const std::string name_;
};

struct RegularFile {
  Fd fd;
  uint64_t size = 0;
};

// For reading; ErrorCode::damaged if it is anything but a regular file.
Result<RegularFile> open_regular_file(const std::string& path);

// A file as it is.
class PlainSource final : public ByteSource {
 public:
  static Result<std::unique_ptr<PlainSource>> open(const std::string& path);

  Status read_exact(uint64_t offset, std::span<std::byte> out) const override;
  uint64_t size() const override { return file_.size; }
  int fd() const { return file_.fd.get(); }

 private:
  PlainSource(RegularFile file, const std::string& path)
      : ByteSource(path), file_(std::move(file)) {}

  const RegularFile file_;
};

}  // namespace vmsnap
