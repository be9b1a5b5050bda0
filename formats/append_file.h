// Sequential, buffered writing at a position of one's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "formats/byte_sink.h"

namespace vmsnap {

class AppendFile : public ByteSink {
 public:
  // `fd` is borrowed.
  AppendFile(int fd, std::string name, uint64_t offset);

  Status append(std::span<const std::byte> bytes) override;
  uint64_t offset() const override { return flushed_ + buffer_.size(); }
  Status finish() override { return flush(); }

 private:
  Status flush();

  const int fd_;
  const std::string name_;
  uint64_t flushed_;
  std::vector<std::byte> buffer_;
};

}  // namespace vmsnap
