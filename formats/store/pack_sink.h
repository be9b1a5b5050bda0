// The packs that one writer makes: frames in, finished pack files out.
//
// Packs are written under hidden names (AtomicFile); until publish() they are
// not there for anybody, and destruction without it removes them.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "formats/file.h"
#include "formats/frame_sink.h"
#include "formats/store/pack_layout.h"
#include "formats/store/pack_set.h"

namespace vmsnap {

class PackSink : public FrameSink {
 public:
  // New packs get their numbers from `packs`; a pack is ended when its frames
  // reach `pack_bytes`, far below max_pack_bytes. `deltas`: whether there may be
  // delta frames. `master` is null for a store that is not sealed. All are
  // borrowed.
  PackSink(StorePaths paths, PackSet& packs, uint64_t pack_bytes, bool deltas,
           const SecretKey* master);
  ~PackSink() override;

  Result<FramePlace> reserve(uint64_t bytes) override;
  std::optional<uint64_t> next_pack() const override;
  Result<std::optional<FramePlace>> reserve_in(uint64_t pack, uint64_t bytes) override;
  Status write(const FramePlace& place, std::span<const std::byte> frames,
               std::span<const FrameNote> notes) override;
  bool sealed() const override { return master_ != nullptr; }
  Status read(uint64_t entry, std::span<std::byte, page_size> out) const override;
  // Ends all packs, and fsyncs them. Returns 0: no frame is in the manifest.
  // May be called again.
  Result<uint64_t> close() override;

  std::vector<std::byte> packs_section(const std::vector<uint64_t>& references) const override;

  // For whoever commits, after close().
  struct Finished {
    layout::PackRow row = {};  // `referenced` is all its frames
    std::vector<layout::PackFrame> frames;
  };
  const std::vector<Finished>& finished() const { return finished_; }
  uint64_t bytes() const;  // of all files

  // The final names, without fsync of the directory. The caller holds the
  // commit lock, so that nobody takes them for dead packs.
  Status publish();

 private:
  struct Pack;

  Result<Pack*> start_pack();
  FramePlace reserve_in_current(uint64_t bytes);
  Status end_pack(Pack& pack);

  const StorePaths paths_;
  PackSet& packs_;
  const uint64_t pack_bytes_;
  const uint32_t version_;
  const SecretKey* const master_;

  mutable std::mutex mutex_;
  std::map<uint64_t, std::unique_ptr<Pack>> all_;  // by number
  Pack* current_ = nullptr;
  std::vector<Finished> finished_;
};

}  // namespace vmsnap
