#include "restore/vm_start.h"

#include <unistd.h>

#include <filesystem>
#include <thread>

#include "formats/elapsed.h"
#include "formats/interrupt.h"
#include "formats/log.h"
#include "formats/test_point.h"
#include "restore/guest_agent.h"
#include "restore/state_loader.h"

namespace vmsnap {

namespace {

using Clock = std::chrono::steady_clock;

// QEMU makes its monitor's socket early in its start, and listens at once.
Result<Qmp> connect_when_ready(const std::string& socket, const Process& process) {
  constexpr auto limit = std::chrono::seconds(60);
  const Clock::time_point deadline = Clock::now() + limit;
  for (;;) {
    auto qmp = Qmp::connect(socket, limit, Qmp::Signals::heed);
    if (qmp) return qmp;
    VMSNAP_CHECK(check_interrupted());
    if (!process.alive()) {
      return fail(ErrorCode::vm, "QEMU (process {}) ended while it started", process.pid());
    }
    if (Clock::now() > deadline) {
      return tl::unexpected(
          std::move(qmp).error().with_context("QEMU was started, but its monitor does not answer"));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

}  // namespace

Result<LaunchRequest> launch_request(const RestoreOptions& options, const ImageReader& image) {
  LaunchRequest request;
  auto record = vm_record_from_json(image.info().source);
  if (!record) return tl::unexpected(std::move(record).error().with_context(image.path()));
  request.record = *std::move(record);
  request.executable = options.qemu;
  request.working_directory = options.chdir;
  request.replacements = options.replacements;
  request.extra = options.extra;
  return request;
}

VmStart::VmStart(const RestoreOptions& options, std::unique_ptr<ImageReader> image,
                 Clock::time_point started)
    : options_(options), started_(started), image_(std::move(image)) {}

VmStart::~VmStart() = default;

Status VmStart::enter(RestorePhase phase) {
  vm_->record.phase = phase;
  return vm_->dir.write(vm_->record);
}

Status VmStart::prepare() {
  LaunchRequest request = VMSNAP_TRY(launch_request(options_, *image_));
  const bool resume = request.record.was_running && !options_.start_paused;
  vm_ = std::make_unique<ServedVm>(ServedVm{VMSNAP_TRY(RunDir::create(options_.run_dir)),
                                            RestoreRecord(), std::move(image_), Process(), Uffd(),
                                            PageMarks()});
  vm_->record.image = std::filesystem::absolute(vm_->image->path()).string();
  vm_->record.image_id = vm_->image->info().id;
  vm_->record.resume = resume;
  // What is loaded ahead raises no fault, and would be missing in the record.
  vm_->record.prefetch =
      options_.prefetch.value_or(options_.record_working_set ? Prefetch::none : Prefetch::all);
  vm_->record.record_working_set = options_.record_working_set;
  vm_->record.server_pid = ::getpid();
  vm_->record.qmp = vm_->dir.file("qmp.sock");
  request.run_dir = vm_->dir.path();
  auto line = derive_launch_line(request);
  if (!line) {
    vm_->dir.undo();
    return tl::unexpected(std::move(line).error());
  }
  line_ = *std::move(line);
  return {};
}

// From "loaded" on nobody ends the VM: not the guard, not a successor.
Status VmStart::start_guest(Qmp& qmp) {
  VMSNAP_CHECK(enter(RestorePhase::loaded));
  VMSNAP_CHECK(qemu_->let_live());
  if (vm_->record.resume) {
    auto resumed = qmp.execute("cont");
    if (!resumed) {
      // A disk that is locked by the original, for example. It never ran.
      return tl::unexpected(
          std::move(resumed)
              .error()
              .with_context("the restored VM cannot be started")
              .with_remedy("If a disk is in use by the original: point the restored VM to another "
                           "one with --replace OLD=NEW."));
    }
  }
  vm_->record.ready_ms = ms_since(started_);
  // It runs: what goes wrong now is no reason to end it.
  const Status written = enter(RestorePhase::running);
  if (!written) log_warning("{}", written.error().message());
  if (options_.fix_clock) fix_clock();
  return {};
}

// Once the guest runs, nothing here is a reason to fail.
void VmStart::fix_clock() const {
  if (!vm_->record.resume) return log_warning("--fix-clock: the guest is paused; its clock is as it was");
  const auto socket = guest_agent_socket(std::span(line_.arguments).subspan(1));
  if (!socket) return log_warning("--fix-clock: the VM has no guest agent channel; its clock is as it was");
  if (const Status fixed = set_guest_clock(*socket); !fixed) {
    log_warning("--fix-clock: {}", fixed.error().message());
  }
}

Status VmStart::until_running(const VmStartHooks& hooks) {
  VMSNAP_CHECK(vm_->dir.write(vm_->record));
  VMSNAP_TEST_POINT("restore.start");
  const std::vector<std::byte> state = VMSNAP_TRY(vm_->image->device_state());
  qemu_ =
      std::make_unique<StartedVm>(VMSNAP_TRY(StartedVm::start(line_, vm_->dir.file("qemu.log"))));
  vm_->process = VMSNAP_TRY(Process::open(qemu_->process().pid()));
  vm_->record.pid = vm_->process.pid();
  vm_->record.start_time = vm_->process.start_time();
  VMSNAP_CHECK(enter(RestorePhase::launched));
  VMSNAP_TEST_POINT("restore.launched");

  Qmp qmp = VMSNAP_TRY(connect_when_ready(vm_->record.qmp, vm_->process));
  VMSNAP_CHECK(hooks.take_memory(*vm_, qmp));
  VMSNAP_CHECK(enter(RestorePhase::registered));
  VMSNAP_TEST_POINT("restore.registered");
  VMSNAP_CHECK(enter(RestorePhase::loading));
  VMSNAP_CHECK(load_device_state(qmp, state));
  VMSNAP_CHECK(hooks.may_run());
  VMSNAP_CHECK(check_interrupted());
  return start_guest(qmp);
}

Status VmStart::run(const VmStartHooks& hooks) {
  VMSNAP_CHECK(prepare());
  const Status ran = until_running(hooks);
  if (!ran) {
    Error error = qemu_ ? qemu_->explain(ran.error()) : ran.error();
    if (qemu_) kill_and_wait(qemu_->process());
    hooks.let_go();
    qemu_.reset();
    vm_->dir.undo();
    return tl::unexpected(std::move(error));
  }
  VMSNAP_TEST_POINT("restore.running");
  qemu_.reset();
  return {};
}

}  // namespace vmsnap
