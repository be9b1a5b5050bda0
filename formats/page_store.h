// Stores page contents once each: the part of the writer that its worker
// threads share.
//
// Turns the bytes of pages into page entries. What is not known already goes
// to a FrameSink, one write a batch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "formats/error.h"
#include "formats/frame_batch.h"
#include "formats/frame_sink.h"
#include "formats/hint_table.h"
#include "formats/image_writer.h"
#include "formats/known_pages.h"

namespace vmsnap {

class PageStore {
 public:
  static constexpr size_t max_batch = FrameBatch::max_pages;

  // One worker's buffers.
  struct Scratch {
    FrameBatch frames;
    std::function<void()> between_pages = [] {};  // see ImageWriter::Encoder
    std::vector<FrameBatch::Page> written;
    std::vector<uint64_t> hashes;
    std::vector<std::pair<uint64_t, uint32_t>> by_hash;
    std::vector<uint32_t> leaders;  // k: k, or a page of the batch before it with its bytes
    std::vector<uint32_t> pending;
    std::vector<uint32_t> waiting;
    std::vector<uint32_t> to_store;
  };

  // Both are borrowed; `known` may be null. `name` is for errors.
  static Result<std::unique_ptr<PageStore>> create(FrameSink& sink, KnownPages* known,
                                                   std::string name, ImageWriterOptions options);

  // Sets entries[k] to the entry of page numbers[k], which is at
  // pages[k * 4096]; at most max_batch of them. Any number of threads at once,
  // each with its own scratch. Blocks on the disk, and for other workers that
  // are storing the same bytes. After an error the sink is of no use.
  Result<PageCounts> store(Scratch& scratch, std::span<const uint64_t> numbers,
                           std::span<const std::byte> pages, std::span<uint64_t> entries);

  // Fails if a store() did.
  Status status() const;

 private:
  class Claims;

  PageStore(FrameSink& sink, KnownPages* known, std::string name, ImageWriterOptions options);

  Result<PageCounts> store_batch(Scratch& scratch, std::span<const uint64_t> numbers,
                                 std::span<const std::byte> pages, std::span<uint64_t> entries);
  void find_leaders(Scratch& scratch, std::span<const std::byte> pages) const;
  Result<HintTable::Answer> look_up(uint64_t hash, HintTable::Owner owner, uint64_t number,
                                    std::span<const std::byte, page_size> page, uint64_t& entry);
  Result<uint64_t> write_frames(Scratch& scratch, std::span<const std::byte> pages,
                                std::span<uint64_t> entries);
  bool may_share(uint64_t number, uint64_t entry) const;

  FrameSink& sink_;
  KnownPages* const known_;
  const std::string name_;
  const ImageWriterOptions options_;
  std::unique_ptr<HintTable> hints_;
  std::unique_ptr<SimilarPages> similar_;  // null: no deltas
  std::atomic<HintTable::Owner> next_owner_ = 1;
  std::atomic<bool> failed_ = false;
};

}  // namespace vmsnap
