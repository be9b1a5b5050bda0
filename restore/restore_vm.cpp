#include "restore/restore_vm.h"

#include <unistd.h>

#include <filesystem>
#include <thread>

#include "formats/elapsed.h"
#include "formats/interrupt.h"
#include "formats/log.h"
#include "formats/test_point.h"
#include "restore/guest_ram.h"
#include "restore/launch.h"
#include "restore/served_vm.h"
#include "restore/state_loader.h"
#include "snap/vmm/handover.h"
#include "snap/vmm/qmp.h"
#include "snap/vmm/ram_blocks.h"

namespace vmsnap {

namespace {

using Clock = std::chrono::steady_clock;

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

// QEMU makes its monitor's socket early in its start, and listens at once.
Result<Qmp> connect_when_ready(const std::string& socket, const Process& process) {
  constexpr auto limit = std::chrono::seconds(60);
  const Clock::time_point deadline = Clock::now() + limit;
  for (;;) {
    auto qmp = Qmp::connect(socket, limit);
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

// One restore, from the first step to the running guest.
class Restore {
 public:
  Restore(const RestoreOptions& options, CommandContext& context)
      : options_(options), context_(context) {}

  Status run();

 private:
  Status prepare();
  Status until_running();
  Status take_memory(Qmp& qmp);
  Status start_guest(Qmp& qmp);
  Status enter(RestorePhase phase) {
    vm_->record.phase = phase;
    return vm_->dir.write(vm_->record);
  }

  const RestoreOptions& options_;
  CommandContext& context_;
  const Clock::time_point started_ = Clock::now();
  LaunchLine line_;
  // In the order of their making: the server must end before the QEMU that it
  // serves is killed, and both before the directory goes.
  std::unique_ptr<ServedVm> vm_;
  std::unique_ptr<StartedVm> qemu_;
  std::unique_ptr<Serving> serving_;
};

Status Restore::prepare() {
  auto image = VMSNAP_TRY(open_image(options_.image));
  LaunchRequest request = VMSNAP_TRY(launch_request(options_, *image));
  const bool resume = request.record.was_running && !options_.start_paused;
  vm_ = std::make_unique<ServedVm>(ServedVm{VMSNAP_TRY(RunDir::create(options_.run_dir)),
                                            RestoreRecord(), std::move(image), Process(), Uffd(),
                                            VMSNAP_TRY(PageMarks::in_memory(0))});
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

Status Restore::take_memory(Qmp& qmp) {
  const Process& process = vm_->process;
  auto blocks = VMSNAP_TRY(
      match_blocks(vm_->image->info().regions, VMSNAP_TRY(read_ram_blocks(qmp, process))));
  HandedUffd handed =
      VMSNAP_TRY(bring_out_uffd(process, &qmp, VMSNAP_TRY(wanted_features()), KeepInVmm::yes));
  vm_->uffd = std::move(handed.uffd);
  vm_->record.uffd = handed.remote_fd;
  vm_->record.ranges = VMSNAP_TRY(watch_memory(vm_->uffd, process, std::move(blocks)));
  vm_->marks = VMSNAP_TRY(PageMarks::create(vm_->dir.file("pages"), vm_->image->page_count()));
  const uint64_t present =
      VMSNAP_TRY(overwrite_present_pages(process, *vm_->image, vm_->record.ranges, vm_->marks));
  log_debug("{} pages were there before the restore", present);
  serving_ = Serving::start(*vm_);
  return enter(RestorePhase::registered);
}

// From "loaded" on nobody ends the VM: not the guard, not a successor.
Status Restore::start_guest(Qmp& qmp) {
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
  return {};
}

Status Restore::until_running() {
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
  VMSNAP_CHECK(take_memory(qmp));
  VMSNAP_TEST_POINT("restore.registered");
  VMSNAP_CHECK(enter(RestorePhase::loading));
  VMSNAP_CHECK(load_device_state(qmp, state));
  VMSNAP_CHECK(check_interrupted());
  return start_guest(qmp);
}

Status Restore::run() {
  VMSNAP_CHECK(prepare());
  const Status ran = until_running();
  if (!ran) {
    Error error = qemu_ ? qemu_->explain(ran.error()) : ran.error();
    if (qemu_) kill_and_wait(qemu_->process());
    serving_.reset();
    qemu_.reset();
    vm_->dir.undo();
    return tl::unexpected(std::move(error));
  }
  VMSNAP_TEST_POINT("restore.running");
  qemu_.reset();
  return serve_to_end(*vm_, std::move(serving_), {options_.detach, options_.json, started_},
                      context_);
}

}  // namespace

Status restore_vm(const RestoreOptions& options, CommandContext& context) {
  install_interrupt_handlers();
  return Restore(options, context).run();
}

Status print_launch_line(const RestoreOptions& options, CommandContext& context) {
  const auto image = VMSNAP_TRY(open_image(options.image));
  LaunchRequest request = VMSNAP_TRY(launch_request(options, *image));
  request.run_dir = options.run_dir.empty() ? "/run/vmsnap/vmsnap-XXXXXX"
                                            : std::filesystem::absolute(options.run_dir).string();
  const LaunchLine line = VMSNAP_TRY(derive_launch_line(request));
  if (options.json) {
    const nlohmann::json array = line.arguments;
    context.out << array.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  } else {
    context.out << shell_quoted(line) << "\n";
  }
  return {};
}

}  // namespace vmsnap
