// Answers the userfaultfd. Before the instant it lets writers through and notes
// where; from then on it copies the page that a writer waits for, and then lets
// the writer go on.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <vector>

#include "formats/file.h"
#include "snap/capture_state.h"

namespace vmsnap {

class FaultHandler {
 public:
  // A guest that waits longer than `stall_limit` for room in the staging
  // memory (a disk that hangs) makes the capture fail. `heartbeat` is called
  // several times a second from the thread in run().
  FaultHandler(CaptureState& state, std::chrono::milliseconds stall_limit,
               std::function<void()> heartbeat);
  ~FaultHandler();

  Status prepare();
  // Until request_stop() and nothing is left to answer, or the capture fails.
  // In a thread of its own; errors go to state.fail().
  void run();
  void request_stop();

 private:
  Result<size_t> answer_events();
  Status handle(const UffdEvent& event);
  Status let_through(CapturedPiece& piece, uint64_t unit);
  Status handle_write(CapturedPiece& piece, uint64_t unit);
  Status handle_missing(CapturedPiece& piece, uint64_t unit);
  CapturedPiece::Window around(const CapturedPiece& piece, uint64_t unit) const;
  Status copy_pages(CapturedPiece& piece, uint64_t unit);
  Status copy_large_unit(CapturedPiece& piece, uint64_t unit);
  Result<Chunk*> chunk_with_room(size_t pages);
  void flush();

  CaptureState& state_;
  std::chrono::milliseconds stall_limit_;
  std::function<void()> heartbeat_;
  Fd stop_;  // eventfd
  std::atomic<bool> stopping_ = false;
  Chunk* chunk_ = nullptr;        // being filled
  uint64_t next_page_ = 0;        // after the last that was copied
  uint64_t ahead_ = 1;            // how many at a time: grows while they come in order
  std::vector<std::byte> zeros_;  // one hugetlb page, made when first needed
};

}  // namespace vmsnap
