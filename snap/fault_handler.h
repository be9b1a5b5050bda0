// Answers the userfaultfd: copies the page that a writer waits for, and lets
// the writer go on.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
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

  // Held while memory is being armed: events are answered before or after it,
  // never in the middle, when marks are there and states are not.
  std::mutex& arming() { return arming_; }
  // To be set under arming(): from now on, what is filled in was not there at
  // the instant.
  void set_armed() { armed_ = true; }

 private:
  Status handle(const UffdEvent& event);
  Status handle_write(CapturedPiece& piece, uint64_t unit);
  Status handle_missing(CapturedPiece& piece, uint64_t unit);
  Status copy_unit(CapturedPiece& piece, uint64_t unit);
  Result<Chunk*> chunk_with_room();
  void flush();

  CaptureState& state_;
  std::chrono::milliseconds stall_limit_;
  std::function<void()> heartbeat_;
  Fd stop_;  // eventfd
  std::atomic<bool> stopping_ = false;
  std::mutex arming_;
  bool armed_ = false;
  Chunk* chunk_ = nullptr;        // being filled with single pages
  std::vector<std::byte> zeros_;  // one hugetlb page, made when first needed
  bool first_fault_seen_ = false;
};

}  // namespace vmsnap
