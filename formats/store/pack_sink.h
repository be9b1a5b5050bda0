// The packs that one writer makes: frames in, finished pack files out.
//
// Packs are written under hidden names (AtomicFile); until commit() they are
// not there for anybody, and destruction without commit removes them.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "formats/file.h"
#include "formats/frame_sink.h"
#include "formats/store/pack_layout.h"
#include "formats/store/pack_set.h"

namespace vmsnap {

class PackSink : public FrameSink {
 public:
  // New packs go to `directory`, and get their numbers from `packs` (borrowed).
  // A pack is ended when its frames reach `pack_bytes`, below max_pack_bytes.
  // `keys` is null for a store that is not sealed.
  PackSink(std::string directory, PackSet& packs, uint64_t pack_bytes, const SecretKey* master);
  ~PackSink() override;

  Result<FramePlace> reserve(uint64_t bytes) override;
  Status write(const FramePlace& place, std::span<const std::byte> frames,
               std::span<const FrameNote> notes) override;
  bool sealed() const override { return master_ != nullptr; }
  Status read(uint64_t entry, std::span<std::byte, page_size> out) const override;
  Result<uint64_t> close() override;

  // Overriden by whoever knows which packs the image refers to.
  std::vector<std::byte> packs_section() const override { return {}; }

  // What close() ended: all there is to know of the new packs.
  struct Finished {
    uint64_t number = 0;
    layout::PackRow row = {};  // `referenced` is all its frames
    std::vector<layout::PackFrame> frames;
  };
  const std::vector<Finished>& finished() const { return finished_; }
  uint64_t bytes() const;  // of all files, after close()

  // fsync of every pack, without a name yet.
  Status sync();
  // The final names, and fsync of the directory. The caller holds the commit
  // lock, so that nobody takes them for dead packs.
  Status commit();

 private:
  struct Pack;

  Result<Pack*> start_pack();
  Status end_pack(Pack& pack);

  const std::string directory_;
  PackSet& packs_;
  const uint64_t pack_bytes_;
  const SecretKey* const master_;

  mutable std::mutex mutex_;  // the list, and who is the current one
  std::map<uint64_t, std::unique_ptr<Pack>> open_;  // by number
  Pack* current_ = nullptr;
  std::vector<Finished> finished_;
};

}  // namespace vmsnap
