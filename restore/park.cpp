#include "restore/park.h"

#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <optional>

#include "formats/elapsed.h"
#include "formats/json.h"
#include "formats/log.h"
#include "formats/test_point.h"
#include "restore/guest_ram.h"
#include "restore/ram_drop.h"
#include "restore/reattach.h"
#include "restore/served_vm.h"
#include "snap/vmm/handover.h"
#include "snap/vmm/ksm_pause.h"
#include "snap/vmm/qmp.h"
#include "snap/vmm/ram_blocks.h"
#include "snap/vmm/vm_record.h"

namespace vmsnap {

namespace {

namespace fs = std::filesystem;

Result<bool> is_running(Qmp& qmp) {
  const nlohmann::json status = VMSNAP_TRY(qmp.execute("query-status"));
  if (const auto running = flag_of(status, "running")) return *running;
  return fail(ErrorCode::vm, "query-status does not tell whether the VM runs");
}

// One parking, from the first look at the VM to its page server.
class Parking {
 public:
  Parking(const ParkOptions& options, const TakeParkImage& take_image, CommandContext& context)
      : options_(options), take_image_(take_image), context_(context) {}

  Status run();

 private:
  Status prepare();
  Status capture();
  Status attach();
  Status drop();
  Status serve();
  Status undo();
  Error after_failure(Error error);
  void print_summary() const;

  const ParkOptions& options_;
  const TakeParkImage& take_image_;
  CommandContext& context_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  double captured_ms_ = 0;
  std::unique_ptr<ServedVm> vm_;
  GuestMemory memory_;
  bool was_captured_ = false, was_dropped_ = false;
  pid_t server_ = 0;
};

// The VM is only looked at.
Status Parking::prepare() {
  Qmp qmp = VMSNAP_TRY(Qmp::connect(options_.image.qmp, std::chrono::seconds(10), Qmp::Signals::heed));
  Process process = VMSNAP_TRY(Process::open(VMSNAP_TRY(qmp.peer_pid())));
  std::vector<MemoryBlock> blocks;
  for (const RamBlock& block : VMSNAP_TRY(read_ram_blocks(qmp, process))) {
    blocks.push_back({block.name, {block.host, block.length}, block.guest_address, 0});
  }
  VMSNAP_TRY(droppable_memory(process, std::move(blocks)));
  RestoreRecord record;
  record.phase = RestorePhase::parking;
  record.of_parked_vm = true;
  record.resume = VMSNAP_TRY(is_running(qmp));
  record.pid = process.pid();
  record.start_time = process.start_time();
  record.server_pid = ::getpid();
  std::error_code failed;
  record.qmp = fs::canonical(options_.image.qmp, failed).string();
  if (failed) return fail_errno(failed.value(), "cannot find the socket {}", options_.image.qmp);
  vm_ = std::make_unique<ServedVm>(
      ServedVm{VMSNAP_TRY(RunDir::create(options_.run_dir)), std::move(record), nullptr,
               std::move(process), Uffd(), PageMarks()});
  return vm_->dir.write(vm_->record);
}

Status Parking::capture() {
  const ParkImage taken = VMSNAP_TRY(take_image_(options_.image, context_));
  was_captured_ = true;
  VMSNAP_TEST_POINT("park.captured");
  captured_ms_ = ms_since(started_);
  // By its name, as it will be opened by who comes after us.
  vm_->record.image = fs::absolute(taken.file).string();
  vm_->image = VMSNAP_TRY(
      open_image({vm_->record.image, {.directory = {}, .key = options_.image.store.key}, {}}));
  vm_->record.image_id = vm_->image->info().id;
  if (vm_->record.image_id == taken.id) {
    // Somebody may have resumed or paused it since we looked: who captured knows.
    vm_->record.resume = VMSNAP_TRY(vm_record_from_json(vm_->image->info().source)).was_running;
    return vm_->dir.write(vm_->record);
  }
  return fail(ErrorCode::damaged, "{} is not the image that was made ({}, not {})",
              vm_->record.image, vm_->record.image_id, taken.id);
}

Status Parking::attach() {
  Qmp qmp = VMSNAP_TRY(Qmp::connect(vm_->record.qmp));
  if (VMSNAP_TRY(is_running(qmp))) {
    return fail(ErrorCode::vm, "somebody resumed {} while it was captured", vm_->process.describe());
  }
  memory_ = VMSNAP_TRY(droppable_memory(
      vm_->process, VMSNAP_TRY(match_blocks(vm_->image->info().regions,
                                            VMSNAP_TRY(read_ram_blocks(qmp, vm_->process))))));
  if (memory_.page_count() != vm_->image->page_count()) {
    return fail(ErrorCode::damaged, "{} has {} pages, {} has {}", vm_->record.image,
                vm_->image->page_count(), vm_->process.describe(), memory_.page_count());
  }
  vm_->record.ranges = served_ranges(memory_);
  vm_->marks = VMSNAP_TRY(PageMarks::create(vm_->dir.file("pages"), memory_.page_count()));
  HandedUffd handed = VMSNAP_TRY(bring_out_uffd(
      vm_->process, &qmp, VMSNAP_TRY(wanted_features()) | ram_drop_features, KeepInVmm::yes));
  vm_->uffd = std::move(handed.uffd);
  vm_->record.uffd = handed.remote_fd;
  VMSNAP_CHECK(open_control(*vm_));
  VMSNAP_CHECK(vm_->dir.write(vm_->record));
  VMSNAP_TEST_POINT("park.attached");
  return {};
}

Status Parking::drop() {
  // What it merges loses its protection.
  std::optional<KsmPause> ksm;
  if (memory_.mergeable) ksm = VMSNAP_TRY(KsmPause::begin());
  VMSNAP_CHECK(freeze_memory(vm_->uffd, vm_->record.ranges, vm_->marks));
  VMSNAP_TEST_POINT("park.frozen");
  VMSNAP_CHECK(compare_memory(vm_->process, *vm_->image, memory_));
  VMSNAP_TEST_POINT("park.compared");
  was_dropped_ = true;
  VMSNAP_CHECK(drop_memory(vm_->process, vm_->uffd, memory_, vm_->marks,
                           [this] { vm_->dir.forget_lock(); }));
  VMSNAP_TEST_POINT("park.dropped");
  return {};
}

Status Parking::serve() {
  VMSNAP_CHECK(thaw_memory(vm_->uffd, vm_->record.ranges, vm_->marks));
  VMSNAP_TEST_POINT("park.thawed");
  vm_->record.phase = RestorePhase::parked;
  VMSNAP_CHECK(vm_->dir.write(vm_->record));
  server_ = VMSNAP_TRY(serve_in_background(*vm_));
  return {};
}

// Nothing was dropped: the VM is to be as it was.
Status Parking::undo() {
  const bool attached = vm_->record.uffd >= 0;
  if (attached) VMSNAP_CHECK(release_memory(vm_->uffd, vm_->record.ranges, vm_->marks));
  if (was_captured_ && vm_->record.resume) VMSNAP_CHECK(resume_vm(vm_->record.qmp));
  if (attached) VMSNAP_CHECK(close_in_process(vm_->process, vm_->record.uffd));
  vm_->dir.undo();
  return {};
}

Error Parking::after_failure(Error error) {
  error = vm_->process.explain(std::move(error));
  Status undone;
  if (!was_dropped_) {
    undone = undo();
  } else {
    // As one that is parked, so that `unpark` goes on with what fails here.
    undone = serve();
    if (undone) undone = unpark_by_server(vm_->dir.path(), vm_->record);
  }
  if (!vm_->process.alive()) vm_->dir.undo();  // there is nothing to take over
  if (undone || !vm_->process.alive()) return error;
  log_warning("{}", undone.error().message());
  return std::move(error).with_remedy(
      fmt::format("The VM may wait: vmsnap unpark --run-dir {}", vm_->dir.path()));
}

void Parking::print_summary() const {
  uint64_t bytes = 0;
  for (const ServedRange& range : vm_->record.ranges) bytes += range.range.length;
  if (options_.json) {
    const nlohmann::json summary = {{"id", vm_->record.image_id},
                                    {"image", vm_->record.image},
                                    {"run_dir", vm_->dir.path()},
                                    {"pid", vm_->record.pid},
                                    {"server_pid", server_},
                                    {"memory_bytes", bytes},
                                    {"capture_ms", captured_ms_},
                                    {"total_ms", ms_since(started_)}};
    print_json(context_.out, summary);
  } else {
    context_.out << fmt::format(
        "{} is parked in {}\n"
        "  {} MiB of memory are in {}\n"
        "  {:.2f} s in all, process {} brings what is touched\n",
        vm_->process.describe(), vm_->dir.path(), bytes >> 20, vm_->record.image,
        ms_since(started_) / 1000, server_);
  }
  context_.out.flush();
}

Status Parking::run() {
  VMSNAP_CHECK(prepare());
  VMSNAP_TEST_POINT("park.start");
  Status done = capture();
  if (done) done = attach();
  if (done) done = drop();
  if (done) done = serve();
  if (!done) return tl::unexpected(after_failure(std::move(done).error()));
  print_summary();
  return {};
}

}  // namespace

Status park_vm(const ParkOptions& options, const TakeParkImage& take_image, CommandContext& context) {
  return Parking(options, take_image, context).run();
}

}  // namespace vmsnap
