#include "snap/snapshot_output.h"

#include <optional>

#include "formats/file.h"
#include "formats/interrupt.h"
#include "formats/store/store.h"
#include "formats/store/store_writer.h"

namespace vmsnap {

namespace {

ImageWriterOptions writer_options(const SnapshotOptions& options) {
  return {.level = options.level, .deltas = options.deltas};
}

class FileOutput : public SnapshotOutput {
 public:
  static Result<std::unique_ptr<SnapshotOutput>> open(const SnapshotOptions& options,
                                                      uint64_t page_count) {
    auto output = std::make_unique<FileOutput>();
    output->file_ = VMSNAP_TRY(AtomicFile::create(options.output, options.replace_output));
    output->image_ = VMSNAP_TRY(
        ImageWriter::create(output->file_->fd(), options.output, page_count, writer_options(options)));
    return output;
  }

  ImageWriter& image() override { return *image_; }

  Result<Saved> commit(const ImageInfo& info, std::span<const std::byte> device_state,
                       std::span<const uint64_t> working_set) override {
    const uint64_t bytes = VMSNAP_TRY(image_->finish(info, device_state, working_set));
    VMSNAP_CHECK(check_interrupted());
    VMSNAP_CHECK(file_->commit());
    return Saved{file_->path(), bytes};
  }

 private:
  std::optional<AtomicFile> file_;
  std::unique_ptr<ImageWriter> image_;
};

class StoreOutput : public SnapshotOutput {
 public:
  static Result<std::unique_ptr<SnapshotOutput>> open(const SnapshotOptions& options,
                                                      const std::vector<Region>& regions,
                                                      const std::string& vm) {
    auto output = std::make_unique<StoreOutput>();
    output->store_ = VMSNAP_TRY(Store::open_or_create(options.store));
    output->writer_ = VMSNAP_TRY(StoreWriter::begin(
        *output->store_, regions,
        {.backup_name = backup_name(options.tags),
         .vm = vm,
         .domain = options.dedup_domain,
         .image = writer_options(options)}));
    return output;
  }

  ImageWriter& image() override { return writer_->image(); }

  Result<Saved> commit(const ImageInfo& info, std::span<const std::byte> device_state,
                       std::span<const uint64_t> working_set) override {
    const auto committed = VMSNAP_TRY(writer_->commit(info, device_state, working_set));
    return Saved{store_->paths().snapshot(image().id()), committed.added_bytes};
  }

 private:
  std::unique_ptr<Store> store_;
  std::unique_ptr<StoreWriter> writer_;
};

}  // namespace

Result<std::unique_ptr<SnapshotOutput>> open_snapshot_output(const SnapshotOptions& options,
                                                             const std::vector<Region>& regions,
                                                             const std::string& vm) {
  if (options.store.directory.empty()) return FileOutput::open(options, total_pages(regions));
  return StoreOutput::open(options, regions, vm);
}

}  // namespace vmsnap
