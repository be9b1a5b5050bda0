#include "formats/byte_source.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>

namespace vmsnap {

Result<RegularFile> open_regular_file(const std::string& path) {
  RegularFile file;
  // O_NONBLOCK: opening a FIFO must not wait for its writer.
  file.fd = VMSNAP_TRY(open_file(path, O_RDONLY | O_NONBLOCK));
  struct stat status;
  if (::fstat(file.fd.get(), &status) < 0) return fail_errno(errno, "cannot look at {}", path);
  if (!S_ISREG(status.st_mode)) {
    return tl::unexpected(Error(ErrorCode::damaged, path + " is not a regular file")
                              .with_remedy("Give the file that 'vmsnap snapshot' made."));
  }
  file.size = static_cast<uint64_t>(status.st_size);
  return file;
}

Result<std::unique_ptr<PlainSource>> PlainSource::open(const std::string& path) {
  RegularFile file = VMSNAP_TRY(open_regular_file(path));
  return std::unique_ptr<PlainSource>(new PlainSource(std::move(file), path));
}

Status PlainSource::read_exact(uint64_t offset, std::span<std::byte> out) const {
  return read_exact_at(file_.fd.get(), out, offset, name());
}

}  // namespace vmsnap
