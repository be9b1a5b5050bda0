#include "snap/capture.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "formats/test_point.h"
#include "snap/sweeper.h"

namespace vmsnap {

namespace {

constexpr std::chrono::milliseconds progress_interval{200};
// Compressing must not take processor time from the guest and from faults.
constexpr int worker_nice = 5;

bool is_private(const MemoryPiece& piece) {
  return piece.backing == Backing::anonymous || piece.backing == Backing::hugetlb_private;
}

void mark_all(CapturedPiece& piece, uint64_t first_unit, uint64_t end_unit) {
  for (uint64_t unit = first_unit; unit < end_unit; ++unit) piece.states.set(unit, UnitState::armed);
}

void mark_runs(CapturedPiece& piece, const std::vector<RemoteRange>& runs) {
  for (const RemoteRange& run : runs) {
    mark_all(piece, piece.unit_of(run.start), piece.unit_of(run.end() + (piece.piece.unit_bytes - 1)));
  }
}

// Marks what a file of shared memory holds. Its holes become pages through a
// missing fault only, which the fault handler answers, from now on.
Status mark_file_data(const Process& process, const PageMap& pagemap, CapturedPiece& piece) {
  const int fd = piece.piece.file->get();
  if (piece.piece.backing == Backing::hugetlb_shared) {
    // No SEEK_DATA there. If the file has no more blocks than the process has
    // pages of it, what is not mapped is a hole; else all may be data.
    struct stat about = {};
    if (::fstat(fd, &about) < 0) return fail_errno(errno, "cannot look at shared memory");
    piece.expected_blocks = static_cast<uint64_t>(about.st_blocks);
    const auto mapped = VMSNAP_TRY(pagemap.populated(piece.piece.range));
    uint64_t mapped_bytes = 0;
    for (const RemoteRange& run : mapped) mapped_bytes += run.length;
    if (mapped_bytes / 512 == piece.expected_blocks) {
      mark_runs(piece, mapped);
    } else {
      mark_all(piece, 0, piece.states.count());
    }
    return {};
  }
  const off_t start = static_cast<off_t>(piece.piece.file_offset);
  const off_t end = start + static_cast<off_t>(piece.piece.range.length);
  for (off_t at = start; at < end;) {
    const off_t data = ::lseek(fd, at, SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;
    const off_t hole = data < 0 ? -1 : ::lseek(fd, data, SEEK_HOLE);
    if (hole < 0) return fail_errno(errno, "cannot find the data in shared memory of {}", process.describe());
    if (data >= end) break;
    mark_all(piece, static_cast<uint64_t>(data - start) / page_size,
             static_cast<uint64_t>(std::min(hole, end) - start + page_size - 1) / page_size);
    at = hole;
  }
  return {};
}

}  // namespace

uint64_t capture_features(const GuestMemory& memory) {
  uint64_t features = uffd_feature::pagefault_flag_wp;
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
  std::unique_ptr<Capture> capture(new Capture(writer, std::move(options)));
  capture->state_ = std::make_unique<CaptureState>(process, std::move(pagemap), std::move(uffd), memory,
                                                   std::move(staging));
  capture->faults_ = std::make_unique<FaultHandler>(*capture->state_, capture->options_.stall_limit,
                                                    capture->options_.heartbeat);
  VMSNAP_CHECK(capture->faults_->prepare());
  return capture;
}

Capture::~Capture() {
  if (!state_) return;
  state_->fail(Error(ErrorCode::interrupted, "the capture was given up"));
  // The guest first: this frees it, whatever our threads are doing. They read
  // the descriptor's number, so it goes only after they have gone; the marks
  // go now.
  for (const auto& piece : state_->pieces) (void)state_->uffd.unregister_range(piece->piece.range);
  options_.released();
  stop_threads();
}

void Capture::stop_threads() {
  if (faults_) faults_->request_stop();
  if (sweep_thread_.joinable()) sweep_thread_.join();
  if (fault_thread_.joinable()) fault_thread_.join();
  state_->staging->close();
  for (std::thread& worker : workers_) {
    if (worker.joinable()) worker.join();
  }
}

Status Capture::begin() {
  for (unsigned i = 0; i < std::max(1u, options_.workers); ++i) {
    workers_.emplace_back([this] { compress(); });
  }
  fault_thread_ = std::thread([this] { faults_->run(); });
  for (const auto& piece : state_->pieces) {
    const RegisterMode mode = {.missing = piece->piece.shared(), .write_protect = true};
    const RegisterOutcome outcome = VMSNAP_TRY(state_->uffd.register_range(piece->piece.range, mode));
    if (outcome == RegisterOutcome::done) {
      if (piece->piece.shared()) {
        VMSNAP_CHECK(mark_file_data(state_->process, state_->pagemap, *piece));
      }
      continue;
    }
    return tl::unexpected(
        Error(ErrorCode::refused,
              fmt::format("memory of {} at {:#x} {}", state_->process.describe(),
                          piece->piece.range.start.address(),
                          outcome == RegisterOutcome::busy ? "is watched by another userfaultfd"
                                                           : "cannot be write-protected"))
            .with_remedy(outcome == RegisterOutcome::busy
                             ? "Another snapshot or migration is at work on it: wait for it to end."
                             : "Give the VM anonymous, memfd, tmpfs or hugetlbfs memory."));
  }
  VMSNAP_TEST_POINT("snapshot.registered");
  return state_->status();
}

Status Capture::arm() {
  std::lock_guard lock(faults_->arming());
  const size_t half = state_->pieces.size() / 2;
  for (size_t i = 0; i < state_->pieces.size(); ++i) {
    if (i == half) VMSNAP_TEST_POINT("pause.half_armed");
    VMSNAP_CHECK(arm_piece(*state_->pieces[i]));
  }
  faults_->set_armed();
  VMSNAP_TEST_POINT("pause.armed");
  return state_->status();
}

Status Capture::arm_piece(CapturedPiece& piece) {
  for (;;) {
    const ProtectOutcome outcome = VMSNAP_TRY(state_->uffd.write_protect(piece.piece.range));
    if (outcome == ProtectOutcome::done) break;
    if (outcome == ProtectOutcome::no_mapping) {
      return tl::unexpected(state_->discarded(piece.piece.range.start));
    }
    VMSNAP_CHECK(state_->status());
  }
  // Of private memory the marks themselves say what was there: absent pages
  // carry none, and read as zero.
  if (is_private(piece.piece)) {
    mark_runs(piece, VMSNAP_TRY(state_->pagemap.marked(piece.piece.range)));
  } else if (piece.piece.backing == Backing::private_of_file) {
    mark_all(piece, 0, piece.states.count());
  }
  return {};
}

Status Capture::finish(const std::function<Status()>& on_progress) {
  uint64_t armed = 0;
  for (const auto& piece : state_->pieces) {
    for (uint64_t unit = 0; unit < piece->states.count(); ++unit) {
      armed += piece->states.get(unit) == UnitState::zero ? 0 : piece->unit_pages();
    }
  }
  state_->counters.armed_pages = armed;
  sweep_thread_ = std::thread([this] {
    sweep(*state_);
    swept_ = true;
  });

  bool half_seen = false;
  while (!swept_ && !state_->failed()) {
    std::this_thread::sleep_for(half_seen ? progress_interval / 10 : progress_interval / 40);
    if (!half_seen && state_->counters.copied_pages * 2 >= armed) {
      half_seen = true;
      VMSNAP_TEST_POINT("copy.half");
    }
    if (const Status wanted = on_progress(); !wanted) state_->fail(wanted.error());
  }
  sweep_thread_.join();
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
  state_->uffd.close();
  options_.released();
  VMSNAP_TEST_POINT("copy.done");
  state_->staging->close();
  for (std::thread& worker : workers_) {
    while (state_->counters.zero_pages + state_->counters.duplicate_pages + state_->counters.stored_pages <
               state_->counters.copied_pages &&
           !state_->failed()) {
      if (const Status wanted = on_progress(); !wanted) state_->fail(wanted.error());
      std::this_thread::sleep_for(progress_interval / 10);
    }
    worker.join();
  }
  return state_->status();
}

void Capture::compress() {
  ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), worker_nice);
  ImageWriter::Encoder encoder;
  while (Chunk* chunk = state_->staging->take_full()) {
    const auto counts = writer_.write_pages(encoder, chunk->numbers(), chunk->data());
    state_->staging->give_back(chunk);
    if (!counts) return state_->fail(counts.error());
    state_->counters.zero_pages += counts->zero;
    state_->counters.duplicate_pages += counts->duplicate;
    state_->counters.stored_pages += counts->stored;
  }
}

}  // namespace vmsnap
