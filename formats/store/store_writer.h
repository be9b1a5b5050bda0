// Writes one snapshot into a store, and commits it.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "formats/byte_sink.h"
#include "formats/file.h"
#include "formats/image_writer.h"
#include "formats/store/known_snapshots.h"
#include "formats/store/pack_sink.h"
#include "formats/store/store.h"

namespace vmsnap {

// For one thread, but for the pages: see ImageWriter.
class StoreWriter {
 public:
  struct Options {
    // Whose snapshot before is looked at first: what a backup calls the VM, or
    // if there is none of that, of the VM's own name.
    std::string backup_name;
    std::string vm;
    std::string domain;            // pages are shared only within one
    ImageWriterOptions image;      // its hash is set here, unless a test has set one
    uint64_t pack_bytes = 0;       // 0: by the size of the VM
  };

  // `regions` are the new snapshot's, in order; `store` is borrowed. A snapshot
  // before that cannot be read is one that is not there.
  static Result<std::unique_ptr<StoreWriter>> begin(const Store& store,
                                                    const std::vector<Region>& regions,
                                                    Options options);

  ImageWriter& image() { return *image_; }

  struct Committed {
    uint64_t added_bytes = 0;  // new packs and the manifest
  };

  // After the last page: ends the packs and the manifest, fsyncs them, and puts
  // them under their names, the manifest last. When this returns without an
  // error the snapshot is there for good, and not before. `info`'s domain and
  // added bytes are filled in here. Waits for another commit, if there is one.
  Result<Committed> commit(ImageInfo info, std::span<const std::byte> device_state,
                           std::span<const uint64_t> working_set);

 private:
  StoreWriter(const Store& store, Options options);

  Status keep_old_packs() const;
  void add_to_index() const;

  const Store& store_;
  const Options options_;
  PackSet packs_;
  std::unique_ptr<PackSink> sink_;
  std::unique_ptr<KnownSnapshots> known_;
  std::optional<AtomicFile> file_;
  std::unique_ptr<ByteSink> manifest_;
  std::unique_ptr<ImageWriter> image_;
};

}  // namespace vmsnap
