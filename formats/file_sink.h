// The frames of an image in its own file, from frames_begin on.
#pragma once

#include <atomic>
#include <string>

#include "formats/frame_sink.h"

namespace vmsnap {

class FileSink : public FrameSink {
 public:
  // `fd` is borrowed; `name` is for errors.
  FileSink(int fd, std::string name, uint64_t seed);

  Result<FramePlace> reserve(uint64_t bytes) override;
  Status write(const FramePlace& place, std::span<const std::byte> frames,
               std::span<const FrameNote> notes) override;
  bool sealed() const override { return false; }
  Status read(uint64_t entry, std::span<std::byte, page_size> out) const override;
  Result<uint64_t> close() override;

 private:
  const int fd_;
  const std::string name_;
  const uint64_t seed_;
  std::atomic<uint64_t> end_;  // of the space reserved so far
};

}  // namespace vmsnap
