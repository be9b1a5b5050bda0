#include "snap/capture.h"

#include <algorithm>
#include <set>
#include <utility>

#include "formats/test_point.h"
#include "formats/thread.h"
#include "snap/thread_priority.h"
#include "snap/turn.h"

namespace vmsnap {

namespace {

constexpr std::chrono::milliseconds interval{20};  // of progress
constexpr std::chrono::milliseconds short_interval{5};  // the same, while writers may wait
constexpr std::chrono::milliseconds pace_step{20};  // how soon a paced worker sees what was staged

}  // namespace

uint64_t capture_features(const GuestMemory& memory) {
  uint64_t features = uffd_feature::pagefault_flag_wp | uffd_feature::thread_id;
  for (const MemoryPiece& piece : memory.pieces) {
    switch (piece.backing) {
      case Backing::hugetlb_shared:
      case Backing::hugetlb_private:
        features |= uffd_feature::wp_hugetlbfs_shmem | uffd_feature::missing_hugetlbfs;
        break;
      case Backing::shared_memory:
      case Backing::private_of_file:
        features |= uffd_feature::wp_hugetlbfs_shmem | uffd_feature::missing_shmem;
        break;
      default: break;
    }
  }
  return features;
}

Result<std::unique_ptr<Capture>> Capture::create(const Process& process, const GuestMemory& memory,
                                                 Uffd uffd, ImageWriter& writer,
                                                 CaptureOptions options) {
  auto pagemap = VMSNAP_TRY(PageMap::open(process));
  auto staging = VMSNAP_TRY(Staging::create(options.staging_bytes));
  auto state = std::make_unique<CaptureState>(process, std::move(pagemap), std::move(uffd), memory,
                                              std::move(staging));
  std::unique_ptr<Capture> capture(new Capture(writer, std::move(options), std::move(state)));
  capture->faults_ = std::make_unique<FaultHandler>(*capture->state_, capture->options_.keep_huge_pages,
                                                    capture->options_.stall_limit,
                                                    capture->options_.heartbeat);
  VMSNAP_CHECK(capture->faults_->prepare());
  capture->arming_ = std::make_unique<Arming>(*capture->state_);
  return capture;
}

Capture::~Capture() {
  if (!state_) return;
  state_->fail(Error(ErrorCode::interrupted, "the capture was given up"));
  // The guest first: this frees it, whatever our threads are doing, which may be
  // to wait for a disk that never answers. They read the descriptor's number, so
  // it goes only after they have gone; the marks go now.
  let_go();
  stop_threads();
}

// Frees the target, at once. Only what is ours, and once: kernels before Linux 6.17
// let one userfaultfd unregister what is another's.
void Capture::let_go() {
  const size_t count = watched_.exchange(0);
  for (size_t i = 0; i < count; ++i) {
    (void)state_->uffd.unregister_range(state_->pieces[i]->piece.range);
  }
  options_.released();
}

void Capture::stop_threads() {
  if (faults_) faults_->request_stop();
  if (fault_thread_.joinable()) fault_thread_.join();
  state_->staging->close();
  for (const std::future<void>& worker : workers_) {
    if (worker.valid()) worker.wait();
  }
}

Status Capture::begin(const std::function<Status()>& on_progress) {
  // Nobody answers after a failure: then no writer is to wait for whoever notices it,
  // who may wait for the monitor of a VM that waits for that writer.
  fault_thread_ = VMSNAP_TRY(start_thread([this] {
    faults_->run();
    if (state_->failed()) let_go();
  }));
  for (size_t i = 0; i < state_->pieces.size(); ++i) {
    VMSNAP_CHECK(state_->status());
    VMSNAP_CHECK(watch(state_->pieces[i]->piece));
    watched_ = i + 1;
  }
  options_.watched(state_->uffd);
  VMSNAP_TEST_POINT("snapshot.registered");
  VMSNAP_CHECK(arm_ahead(on_progress));
  VMSNAP_TEST_POINT("snapshot.armed_ahead");
  return state_->status();
}

// The staging is populated meanwhile: a writer that waits must not wait for that. No
// longer than it takes to protect the VM, because early writers wait as well.
Status Capture::arm_ahead(const std::function<Status()>& on_progress) {
  std::atomic<bool> enough = false;
  const auto populated = start_async([&]() noexcept { state_->staging->populate(enough); });
  const Status armed = arming_->ahead(on_progress);
  enough = true;
  return armed;
}

Status Capture::watch(const MemoryPiece& piece) {
  const RegisterMode mode = {.missing = piece.shared(), .write_protect = true};
  const RegisterOutcome outcome = VMSNAP_TRY(state_->uffd.register_range(piece.range, mode));
  if (outcome == RegisterOutcome::done) return {};
  return tl::unexpected(
      Error(ErrorCode::refused,
            fmt::format("memory of {} at {:#x} {}", state_->process.describe(), piece.range.start.address(),
                        outcome == RegisterOutcome::busy ? "is watched by another userfaultfd"
                                                         : "cannot be write-protected"))
          .with_remedy(outcome == RegisterOutcome::busy
                           ? "Another snapshot or migration is at work on it: wait for it to end."
                           : "Give the VM anonymous, memfd, tmpfs or hugetlbfs memory."));
}

Status Capture::arm() {
  std::lock_guard lock(state_->arming);
  VMSNAP_CHECK(arming_->at_instant());
  VMSNAP_TEST_POINT("pause.armed");
  return state_->status();
}

void Capture::start() {
  uint64_t armed = 0;
  for (const auto& piece : state_->pieces) {
    for (uint64_t unit = 0; unit < piece->states.count(); ++unit) {
      armed += piece->states.get(unit) == UnitState::zero ? 0 : piece->unit_pages();
    }
  }
  state_->counters.armed_pages = armed;
  for (unsigned i = 0; i < std::max(1u, options_.workers); ++i) {
    // noexcept: an exception must not vanish in the future, and pages with it.
    auto worker = start_async([this]() noexcept {
      if (const Status worked = work(); !worked) state_->fail(worked.error());
    });
    if (!worker) {
      // Those that there are can do it all.
      if (workers_.empty()) state_->fail(worker.error());
      return;
    }
    workers_.push_back(*std::move(worker));
  }
}

Status Capture::wait_copied(const std::function<Status()>& on_progress) {
  bool half_seen = false;
  for (bool finished = false; !finished && !state_->failed();) {
    finished = sweep_.wait_finished(short_interval);
    faults_->follow_writer();
    // Also when the other half took less time than we waited.
    if (!half_seen && state_->counters.copied_pages * 2 >= state_->counters.armed_pages) {
      half_seen = true;
      VMSNAP_TEST_POINT("copy.half");
    }
    if (const Status wanted = on_progress(); !wanted) state_->fail(wanted.error());
  }
  return state_->status();
}

Status Capture::finish(const std::function<Status()>& on_progress) {
  (void)wait_copied(on_progress);  // what failed is asked for when all threads know
  faults_->request_stop();
  fault_thread_.join();
  VMSNAP_CHECK(state_->status());
  for (const auto& piece : state_->pieces) {
    for (uint64_t unit = 0; unit < piece->states.count(); ++unit) {
      const UnitState state = piece->states.get(unit);
      if (state != UnitState::zero && state != UnitState::done) {
        return fail(ErrorCode::io, "a page at {:#x} was left out: this is a defect of vmsnap",
                    piece->units(unit, 1).start.address());
      }
    }
  }
  // The guest is on its own again; the rest is between us and the disk.
  let_go();
  VMSNAP_TEST_POINT("copy.done");
  state_->staging->close();
  mend_huge_pages();
  for (const std::future<void>& worker : workers_) {
    while (worker.wait_for(interval) != std::future_status::ready) {
      options_.heartbeat();
      if (const Status wanted = on_progress(); !wanted) state_->fail(wanted.error());
    }
  }
  state_->uffd.close();  // until now workers looked at it
  return state_->status();
}

// What had to be split is made huge again, so that the guest is as quick as
// before. Where the kernel will not, khugepaged may, some day.
void Capture::mend_huge_pages() {
  const std::set<RemotePtr> starts = state_->split_huge_pages();
  uint64_t mended = 0;
  for (const RemotePtr start : starts) {
    mended += state_->process.collapse({start, huge_page_bytes}) ? 1 : 0;
  }
  state_->counters.split_huge_pages = starts.size();
  state_->counters.mended_huge_pages = mended;
}

// One worker: what writers waited for comes first, because it holds memory that
// the next of them needs; then the sweep, until there is no more.
Status Capture::work() {
  take_short_turns();
  Turn turn(*state_, *faults_);
  ImageWriter::Encoder encoder([&turn] { turn.end_if_wanted(); });
  Chunk swept = VMSNAP_TRY(Chunk::create());
  swept.populate();
  const auto write_swept = [&]() -> Status {
    const Status written = write(encoder, swept);
    swept.clear();
    return written;
  };
  const auto write_staged = [&](Chunk* chunk) -> Status {
    const Status written = write(encoder, *chunk);
    state_->staging->give_back(chunk);
    return written;
  };
  for (;;) {
    if (Chunk* chunk = state_->staging->try_take_full()) {
      VMSNAP_CHECK(write_staged(chunk));
    } else if (const auto wait = pace_.wait(); wait > Pace::Clock::duration{}) {
      VMSNAP_CHECK(state_->status());
      std::this_thread::sleep_for(std::min<Pace::Clock::duration>(wait, pace_step));
    } else if (VMSNAP_TRY(sweep_.next(swept, write_swept, turn))) {
      VMSNAP_CHECK(write_swept());
    } else {
      break;
    }
  }
  while (Chunk* chunk = state_->staging->take_full()) VMSNAP_CHECK(write_staged(chunk));
  return {};
}

// Compressing must not take a processor from the guest, or from whoever holds
// pages that it waits for.
Status Capture::write(ImageWriter::Encoder& encoder, const Chunk& chunk) {
  const LowerPriority deferred;
  const PageCounts counts = VMSNAP_TRY(writer_.write_pages(encoder, chunk.numbers(), chunk.data()));
  pace_.used(counts.bytes);
  state_->counters.zero_pages += counts.zero;
  state_->counters.duplicate_pages += counts.duplicate;
  state_->counters.stored_pages += counts.stored;
  return {};
}

}  // namespace vmsnap
