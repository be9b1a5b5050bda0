// Stores page contents once each: the part of the writer that its worker
// threads share.
//
// Turns the bytes of pages into page entries. Frames go to the end of a file,
// by an atomic reservation and one pwrite(2) a batch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "formats/error.h"
#include "formats/hint_table.h"
#include "formats/image_writer.h"
#include "formats/page_codec.h"

namespace vmsnap {

class PageStore {
 public:
  static constexpr size_t max_batch = 256;  // pages; bounds a worker's buffers to 1 MiB

  // One worker's buffers.
  struct Scratch {
    FrameEncoder encoder;
    std::vector<std::byte> frames;
    std::vector<uint64_t> hashes;
    std::vector<std::pair<uint64_t, uint32_t>> by_hash;
    std::vector<uint32_t> leaders;  // k: the first page of the batch with the bytes of page k
    std::vector<uint32_t> pending;
    std::vector<uint32_t> waiting;
    std::vector<uint32_t> to_store;
  };

  // Appends to `fd` (borrowed) from offset frames_begin on.
  static Result<std::unique_ptr<PageStore>> create(int fd, std::string name, uint64_t image_seed,
                                                   ImageWriterOptions options);

  // Sets entries[k] to the entry of the page at pages[k * 4096], at most
  // max_batch of them. Any number of threads at once, each with its own
  // scratch. Blocks on the disk, and for other workers that are storing the
  // same bytes. After an error the file is of no use.
  Result<PageCounts> store(Scratch& scratch, std::span<const std::byte> pages,
                           std::span<uint64_t> entries);

  // Writes the end mark. Once, after every store() has returned. Returns where
  // the frames end; fails if a store() did.
  Result<uint64_t> close();

 private:
  class Claims;

  PageStore(int fd, std::string name, uint64_t image_seed, ImageWriterOptions options);

  Result<PageCounts> store_batch(Scratch& scratch, std::span<const std::byte> pages,
                                 std::span<uint64_t> entries);
  void find_leaders(Scratch& scratch, std::span<const std::byte> pages) const;
  Result<HintTable::Answer> look_up(uint64_t hash, HintTable::Owner owner,
                                    std::span<const std::byte, page_size> page, uint64_t& entry);
  Status write_frames(Scratch& scratch, std::span<const std::byte> pages,
                      std::span<uint64_t> entries);

  const int fd_;
  const std::string name_;
  const uint64_t image_seed_;
  const ImageWriterOptions options_;
  std::unique_ptr<HintTable> hints_;
  std::atomic<uint64_t> end_;  // of the space reserved so far
  std::atomic<HintTable::Owner> next_owner_ = 1;
  std::atomic<bool> failed_ = false;
};

}  // namespace vmsnap
