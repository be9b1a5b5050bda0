// Write-protecting guest memory for the instant of a snapshot.
//
// To protect all of it while the VM stands still costs 20 to 40 ms per GiB of
// 4 KiB pages. So nearly all is protected while the VM runs, and early writers
// are let through; at the instant only what they wrote is protected again, and
// what has come into being since:
//
//   ahead()       protects everything, then looks where memory is and where
//                 there are holes
//   again()       protects what was let through meanwhile, until that is little
//   at_instant()  the VM stands still: protects what was let through since, and
//                 what has appeared in the holes
//
// Why nothing escapes: a page loses its mark by our own hand, which notes it
// (CaptureState::let_through); or by being discarded, and then the check after
// its copy fails the capture (capture_state.h). A page that never had one was
// in a hole, and at the instant all holes of private memory are looked through
// (PAGEMAP_SCAN, Linux 6.7). Shared memory has no such holes: its absent pages
// are marked too, and are registered for missing faults; one that the file has,
// but without data yet, is noted when it was let through.
//
// One thread; the fault handler must be running.
#pragma once

#include <functional>
#include <span>

#include "formats/error.h"
#include "snap/capture_state.h"

namespace vmsnap {

class Arming {
 public:
  explicit Arming(CaptureState& state) : state_(state) {}

  // Blocks for some 30 ms per GiB; `on_step` is called several
  // times a millisecond, and an error that it returns ends it.
  Status ahead(const std::function<Status()>& on_step);
  Status again();
  // Under CaptureState::arming, which the caller holds. Sets `armed`.
  Status at_instant();

 private:
  Status protect(RemoteRange range);
  Status survey(CapturedPiece& piece);
  void note_huge(CapturedPiece& piece, const std::vector<RemoteRange>& runs);
  Result<size_t> protect_again();
  Status protect_runs(std::span<const UnitRun> runs);
  Status note_owned(CapturedPiece& piece, RemoteRange range);
  Status protect_appeared(CapturedPiece& piece);
  Status arm_private_hugetlb(CapturedPiece& piece);

  CaptureState& state_;
};

}  // namespace vmsnap
