#include "restore/reattach.h"

#include <unistd.h>

#include "formats/json.h"
#include "formats/text.h"
#include "formats/working_set_file.h"
#include "restore/launch.h"
#include "restore/launch_rules.h"
#include "restore/ram_drop.h"
#include "restore/served_vm.h"
#include "snap/vmm/handover.h"
#include "snap/vmm/qmp.h"

namespace vmsnap {

namespace {

Error start_again(const RestoreRecord& record, const RunDir& dir) {
  return Error(ErrorCode::vm, fmt::format("the restore in {} was cut short before its guest ran; "
                                          "its QEMU is ended",
                                          dir.path()))
      .with_remedy(fmt::format("Start again: vmsnap restore {} --run-dir {}",
                               shell_quoted(record.image), shell_quoted(dir.path())));
}

// A predecessor may have died between "loaded" and `cont`.
Status resume_if_due(ServedVm& vm, bool unpark) {
  const bool due = vm.record.phase == RestorePhase::loaded ||
                   (vm.record.phase == RestorePhase::parked && unpark);
  if (!due) return {};
  if (vm.record.resume) VMSNAP_CHECK(resume_vm(vm.record.qmp));
  vm.record.phase = RestorePhase::running;
  return vm.dir.write(vm.record);
}

// The order in which a predecessor that was killed answered faults is lost; which
// pages they were is not.
void go_on_recording(ServedVm& vm) {
  vm.recorder = std::make_unique<WorkingSetRecorder>(vm.image->page_count(),
                                                     layout::working_set_max_pages);
  for (uint64_t page = 0; page < vm.image->page_count(); ++page) {
    if (vm.marks.resolved(page)) vm.recorder->add(page);
  }
}

// Where there is nothing, or no longer anything, to wait for.
void print_state(const RunDir& dir, const RestoreRecord& record, const std::string& text,
                 const ReattachOptions& options, CommandContext& context) {
  if (!options.json) {
    context.out << text << "\n";
    return;
  }
  print_json(context.out, {{"id", record.image_id},
                           {"run_dir", dir.path()},
                           {"pid", record.pid},
                           {"server_pid", record.server_pid},
                           {"qmp", record.qmp},
                           {"phase", phase_name(record.phase)}});
}

// Killed before the memory was touched: the VM is whole, and perhaps paused.
Status end_parking(const RunDir& dir, RestoreRecord& record, const Process& process,
                   const ReattachOptions& options, CommandContext& context) {
  if (record.resume) VMSNAP_CHECK(resume_vm(record.qmp));
  record.phase = RestorePhase::complete;
  record.server_pid = 0;
  VMSNAP_CHECK(dir.write(record));
  print_state(dir, record, process.describe() + " had not been parked yet", options, context);
  return {};
}

}  // namespace

Status resume_vm(const std::string& qmp_socket) {
  Qmp qmp = VMSNAP_TRY(Qmp::connect(qmp_socket));
  const nlohmann::json status = VMSNAP_TRY(qmp.execute("query-status"));
  // To resume one that runs does nothing.
  if (!flag_of(status, "running").value_or(false)) VMSNAP_TRY(qmp.execute("cont"));
  return {};
}

Status reattach_vm(const ReattachOptions& options, CommandContext& context) {
  const auto started = std::chrono::steady_clock::now();
  RunDir dir = VMSNAP_TRY(RunDir::open(options.run_dir, takeover_patience));
  RestoreRecord record = VMSNAP_TRY(dir.read());
  if (record.clone) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("{} is the directory of one clone", dir.path()))
            .with_remedy("Give --reattach the farm's directory, the one above."));
  }
  constexpr const char* whole = " has all of its memory already";
  auto process = find_process(record);
  if (record.phase < RestorePhase::loaded) {
    if (process) kill_and_wait(*process);
    Error error = start_again(record, dir);
    dir.undo();
    return tl::unexpected(std::move(error));
  }
  if (!process) return tl::unexpected(std::move(process).error());
  if (record.phase == RestorePhase::complete) {
    print_state(dir, record, process->describe() + whole, options, context);
    return {};
  }
  if (record.phase == RestorePhase::parking && record.uffd < 0) {
    return end_parking(dir, record, *process, options, context);
  }

  auto image = VMSNAP_TRY(open_recorded_image(record.image, record.image_id, options.key));
  VMSNAP_CHECK(check_ranges(record, image->page_count()));
  if (record.uffd < 0) return fail(ErrorCode::damaged, "restore.json names no userfaultfd");
  auto uffd = take_userfaultfd(*process, record.uffd);
  if (!uffd) {
    if (record.phase != RestorePhase::filled) return tl::unexpected(std::move(uffd).error());
    // The predecessor closed it, and died before it wrote that down.
    record.phase = RestorePhase::complete;
    record.server_pid = 0;
    print_state(dir, record, process->describe() + whole, options, context);
    return dir.write(record);
  }
  PageMarks marks = VMSNAP_TRY(PageMarks::open(dir.file("pages"), image->page_count()));

  ServedVm vm{std::move(dir),
              std::move(record),
              std::move(image),
              *std::move(process),
              *std::move(uffd),
              std::move(marks)};
  vm.record.server_pid = ::getpid();
  if (options.prefetch) vm.record.prefetch = *options.prefetch;
  VMSNAP_CHECK(vm.dir.write(vm.record));
  if (vm.record.record_working_set) go_on_recording(vm);
  if (vm.record.phase == RestorePhase::parking) {
    VMSNAP_CHECK(settle_memory(vm.process, vm.uffd, vm.record.ranges, vm.marks));
    vm.record.phase = RestorePhase::parked;
    VMSNAP_CHECK(vm.dir.write(vm.record));
  }
  if (vm.record.phase == RestorePhase::parked && !options.unpark) {
    VMSNAP_CHECK(open_control(vm));
    vm.record.server_pid = VMSNAP_TRY(serve_in_background(vm));
    print_state(vm.dir, vm.record,
                fmt::format("{} is parked; process {} serves it", vm.process.describe(),
                            vm.record.server_pid),
                options, context);
    return {};
  }
  std::unique_ptr<Serving> serving = Serving::start(vm);
  VMSNAP_CHECK(resume_if_due(vm, options.unpark));
  return serve_to_end(vm, std::move(serving), {options.detach, options.json, started}, context);
}

}  // namespace vmsnap
