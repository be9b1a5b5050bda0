#include "formats/append_file.h"

#include <utility>

#include "formats/file.h"

namespace vmsnap {

namespace {
constexpr size_t buffer_size = 1 << 20;
}

AppendFile::AppendFile(int fd, std::string name, uint64_t offset)
    : fd_(fd), name_(std::move(name)), flushed_(offset) {}

Status AppendFile::append(std::span<const std::byte> bytes) {
  if (buffer_.size() + bytes.size() > buffer_size) VMSNAP_CHECK(flush());
  if (bytes.size() > buffer_size) {
    VMSNAP_CHECK(write_all_at(fd_, bytes, flushed_, name_));
    flushed_ += bytes.size();
    return {};
  }
  buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  return {};
}

Status AppendFile::flush() {
  VMSNAP_CHECK(write_all_at(fd_, buffer_, flushed_, name_));
  flushed_ += buffer_.size();
  buffer_.clear();
  return {};
}

}  // namespace vmsnap
