#include "formats/store/copy_image.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <optional>
#include <utility>

#include "formats/append_file.h"
#include "formats/file.h"
#include "formats/image_writer.h"
#include "formats/interrupt.h"
#include "formats/metadata.h"
#include "formats/sealed_file.h"
#include "formats/store/store_writer.h"

namespace vmsnap {

namespace {

constexpr size_t batch_pages = 256;

Status copy_pages(const ImageReader& from, ImageWriter& to) {
  ImageWriter::Encoder encoder;
  std::vector<uint64_t> numbers;
  std::vector<std::byte> bytes(batch_pages * page_size);
  const auto flush = [&]() -> Status {
    VMSNAP_TRY(to.write_pages(encoder, numbers, std::span(bytes).first(numbers.size() * page_size)));
    numbers.clear();
    return check_interrupted();
  };
  for (uint64_t page = 0;; ++page) {
    page = VMSNAP_TRY(from.next_data_page(page));
    if (page >= from.page_count()) return flush();
    const auto place = std::span(bytes).subspan(numbers.size() * page_size).first<page_size>();
    VMSNAP_TRY(from.read_page(page, place));
    numbers.push_back(page);
    if (numbers.size() == batch_pages) VMSNAP_CHECK(flush());
  }
}

Result<uint64_t> copy_to_fd(const ImageReader& image, int fd, const std::string& name,
                            bool deltas) {
  const auto writer =
      VMSNAP_TRY(ImageWriter::create(fd, name, image.page_count(), {.deltas = deltas}));
  VMSNAP_CHECK(copy_pages(image, *writer));
  ImageInfo info = image.info();
  info.domain.clear();
  info.added_bytes = 0;
  return writer->finish(info, VMSNAP_TRY(image.device_state()), VMSNAP_TRY(image.working_set()));
}

Result<Fd> unnamed_file(const std::string& directory) {
  auto unnamed = open_file(directory, O_RDWR | O_TMPFILE);
  if (unnamed || unnamed.error().os_errno() != EOPNOTSUPP) return unnamed;
  // NFS and FUSE. Who is killed between these two leaves an empty file.
  std::string name = directory + "/.vmsnap-XXXXXX";
  Fd named(::mkostemp(name.data(), O_CLOEXEC));
  if (!named) return fail_errno(errno, "cannot make a file in {}", directory);
  if (::unlink(name.c_str()) < 0) return fail_errno(errno, "cannot remove {}", name);
  return named;
}

// All that can be read.
Status copy_to(int fd, ByteSink& out) {
  std::vector<std::byte> buffer(1 << 20);
  for (;;) {
    const ssize_t got = ::read(fd, buffer.data(), buffer.size());
    VMSNAP_CHECK(check_interrupted());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail_errno(errno, "cannot read standard input");
    if (got == 0) return out.finish();
    VMSNAP_CHECK(out.append(std::span(buffer).first(static_cast<size_t>(got))));
  }
}

}  // namespace

Result<uint64_t> copy_image(const ImageReader& image, const std::string& path, bool replace,
                            bool deltas) {
  AtomicFile file = VMSNAP_TRY(AtomicFile::create(path, replace));
  const uint64_t bytes = VMSNAP_TRY(copy_to_fd(image, file.fd(), path, deltas));
  VMSNAP_CHECK(file.commit());
  return bytes;
}

Status copy_image_to_pipe(const ImageReader& image, int fd, bool deltas) {
  const char* directory = ::getenv("TMPDIR");
  const Fd file = VMSNAP_TRY(unnamed_file(directory && *directory ? directory : "/var/tmp"));
  const uint64_t length =
      VMSNAP_TRY(copy_to_fd(image, file.get(), "the image for standard output", deltas));
  std::vector<std::byte> buffer(1 << 20);
  for (uint64_t done = 0; done < length; done += buffer.size()) {
    buffer.resize(std::min<uint64_t>(buffer.size(), length - done));
    VMSNAP_CHECK(read_exact_at(file.get(), buffer, done, "a temporary file"));
    VMSNAP_CHECK(write_all(fd, buffer, "standard output"));
    VMSNAP_CHECK(check_interrupted());
  }
  return {};
}

Result<Imported> import_image(const Store& store, const ImageReader& image,
                              const std::string& domain, const std::vector<std::string>& tags,
                              bool deltas) {
  ImageInfo info = image.info();
  for (const std::string& tag : tags) info.tags.push_back(tag);
  VMSNAP_CHECK(check_tags(info.tags, domain));
  const auto writer = VMSNAP_TRY(StoreWriter::begin(
      store, info.regions,
      {.backup_name = backup_name(info.tags),
       .vm = vm_name(info),
       .domain = domain,
       .image = {.deltas = deltas}}));
  VMSNAP_CHECK(copy_pages(image, writer->image()));
  const auto committed = VMSNAP_TRY(writer->commit(info, VMSNAP_TRY(image.device_state()),
                                                   VMSNAP_TRY(image.working_set())));
  return Imported{writer->image().id(), committed.added_bytes};
}

Result<std::unique_ptr<ImageReader>> open_spooled(int fd, const Store& store) {
  const std::string directory = store.paths().temporary();
  const Fd file = VMSNAP_TRY(unnamed_file(directory));
  std::optional<SecretKey> key;
  std::unique_ptr<ByteSink> out;
  if (store.master()) {
    key = VMSNAP_TRY(SecretKey::random());
    out = std::make_unique<SealedWriter>(file.get(), directory, *key);
  } else {
    out = std::make_unique<AppendFile>(file.get(), directory, 0);
  }
  VMSNAP_CHECK(copy_to(fd, *out));
  const std::string path = fmt::format("/proc/self/fd/{}", file.get());
  if (!key) return ImageReader::open(path);
  return ImageReader::open(
      std::shared_ptr<const SealedSource>(VMSNAP_TRY(SealedSource::open(path, *key))));
}

}  // namespace vmsnap
