#include "snap/snapshot_job.h"

#include <thread>
#include <utility>

#include "formats/clock.h"
#include "formats/elapsed.h"
#include "formats/interrupt.h"
#include "formats/test_point.h"
#include "snap/memory_budget.h"
#include "snap/vmm/fill_request.h"
#include "snap/vmm/handover.h"
#include "snap/vmm/preflight.h"

namespace vmsnap {

namespace {

using Clock = std::chrono::steady_clock;

}  // namespace

Result<bool> SnapshotJob::wait_for_restore(const std::vector<MemoryBlock>& blocks) const {
  constexpr std::chrono::milliseconds step{100};
  const Clock::time_point deadline = Clock::now() + options_.restore_wait;
  bool asked = false;
  while (Clock::now() < deadline && VMSNAP_TRY(is_watched(process_, blocks))) {
    VMSNAP_CHECK(check_not_clone(process_, blocks));
    if (!std::exchange(asked, true) && ask_for_fill(process_) == FillAnswer::parked) {
      return tl::unexpected(Error(ErrorCode::refused, process_.describe() + " is parked")
                                .with_remedy("Its memory is in the image that park made. To take "
                                             "another, unpark it first."));
    }
    progress_(SnapshotPhase::waiting_for_restore, nullptr);
    std::this_thread::sleep_for(step);
    VMSNAP_CHECK(check_interrupted());
  }
  return asked;
}

Status SnapshotJob::prepare(std::vector<MemoryBlock> blocks, Qmp* qmp, const std::string& name) {
  progress_(SnapshotPhase::preparing, nullptr);
  memory_ = VMSNAP_TRY(map_guest_memory(process_, std::move(blocks)));
  VMSNAP_CHECK(check_pinned(qmp));
  VMSNAP_CHECK(check_not_shared(process_, memory_));
  staging_bytes_ = VMSNAP_TRY(
      staging_within(options_.memory, {.pages = memory_.page_count(),
                                       .workers = options_.cpus,
                                       .deltas = options_.deltas}));

  if (memory_.mergeable) ksm_ = VMSNAP_TRY(KsmPause::begin());
  GuardedVm guarded = {process_, qmp};
  for (const MemoryPiece& piece : memory_.pieces) guarded.memory.push_back(piece.range);
  guard_.emplace(VMSNAP_TRY(Guard::start(guarded, &ksm_, options_.stall_limit)));
  output_ = VMSNAP_TRY(open_snapshot_output(options_, memory_.regions(), name));
  VMSNAP_TEST_POINT("snapshot.output");
  id_ = output_->image().id();
  return attach(qmp);
}

Status SnapshotJob::check_pinned(Qmp* qmp) const {
  if (!options_.copy_pinned) return check_not_pinned(process_);
  if (!qmp || VMSNAP_TRY(find_pinned(process_)).empty()) return {};
  return check_no_assigned_devices(*qmp);
}

Status SnapshotJob::attach(Qmp* qmp) {
  const auto attach_start = Clock::now();
  HandedUffd handed = VMSNAP_TRY(
      bring_out_uffd(process_, qmp, capture_features(memory_), KeepInVmm::no));
  summary_.attach_ms = ms_since(attach_start);

  CaptureOptions options;
  options.workers = options_.cpus;
  options.staging_bytes = staging_bytes_;
  options.bytes_per_second = options_.bytes_per_second;
  options.keep_huge_pages = options_.keep_huge_pages;
  options.stall_limit = options_.stall_limit;
  options.heartbeat = [this] { guard_->heartbeat(); };
  options.watched = [this](const Uffd& uffd) { guard_->watched(uffd); };
  options.released = [this] { guard_->unwatched(); };
  capture_ = VMSNAP_TRY(
      Capture::create(process_, memory_, std::move(handed.uffd), output_->image(), std::move(options)));
  // From here on a touched page may wait for us.
  guard_->watching();
  return capture_->begin([this]() -> Status {
    guard_->heartbeat();
    return check_interrupted();
  });
}

void SnapshotJob::pause_begins() {
  VMSNAP_TEST_POINT("pause.before");
  pause_start_ = Clock::now();
}

void SnapshotJob::pause_ended() {
  summary_.pause_ms = ms_since(pause_start_);
  guard_->resumed();
  VMSNAP_TEST_POINT("pause.resumed");
  if (armed_) start_copying();
}

void SnapshotJob::start_copying() {
  if (std::exchange(copying_, true)) return;
  copy_start_ = Clock::now();
  capture_->start();
}

Status SnapshotJob::arm() {
  instant_unix_ms_ = now_unix_ms();
  VMSNAP_CHECK(capture_->arm());
  armed_ = true;
  if (!options_.copy_pinned || VMSNAP_TRY(find_pinned(process_)).empty()) return {};
  copied_in_pause_ = true;
  start_copying();
  return capture_->wait_copied([this] { return show_copying(); });
}

Status SnapshotJob::show_copying() const {
  progress_(SnapshotPhase::copying, &capture_->counters());
  return check_interrupted();
}

Result<SnapshotSummary> SnapshotJob::finish(nlohmann::json source,
                                            std::span<const std::byte> device_state) {
  start_copying();
  VMSNAP_CHECK(capture_->finish([this] { return show_copying(); }));
  summary_.copy_ms = ms_since(copy_start_);
  ksm_.reset();
  // What came while we copied: a device that was plugged in, a child.
  if (!copied_in_pause_) VMSNAP_CHECK(check_not_pinned(process_));
  if (memory_.has_file()) VMSNAP_CHECK(check_not_shared(process_, memory_));

  guard_->committing();
  progress_(SnapshotPhase::committing, nullptr);
  ImageInfo info;
  info.id = id_;
  info.created_unix_ms = instant_unix_ms_;
  info.regions = memory_.regions();
  info.tags = options_.tags;
  info.source = std::move(source);
  const auto saved =
      VMSNAP_TRY(output_->commit(info, device_state, capture_->first_written()));

  const CaptureCounters& counters = capture_->counters();
  summary_.id = id_;
  summary_.file = saved.name;
  summary_.image_bytes = saved.bytes;
  summary_.total_pages = memory_.page_count();
  summary_.duplicate_pages = counters.duplicate_pages;
  summary_.stored_pages = counters.stored_pages;
  summary_.zero_pages = summary_.total_pages - summary_.duplicate_pages - summary_.stored_pages;
  summary_.early_writes = counters.early_writes;
  summary_.write_faults = counters.write_faults;
  summary_.split_huge_pages = counters.split_huge_pages;
  summary_.mended_huge_pages = counters.mended_huge_pages;
  summary_.waited_ms = counters.fault_latency.total_ms();
  summary_.fault_p50_us = counters.fault_latency.percentile_us(0.50);
  summary_.fault_p99_us = counters.fault_latency.percentile_us(0.99);
  summary_.fault_max_us = counters.fault_latency.max_us();
  summary_.total_ms = ms_since(start_);
  return summary_;
}

}  // namespace vmsnap
