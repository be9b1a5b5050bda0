#include "restore/reattach.h"

#include <unistd.h>

#include "formats/interrupt.h"
#include "formats/working_set_file.h"
#include "restore/launch.h"
#include "restore/launch_rules.h"
#include "restore/served_vm.h"
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
Status resume_if_due(ServedVm& vm) {
  if (vm.record.phase != RestorePhase::loaded) return {};
  if (vm.record.resume) {
    Qmp qmp = VMSNAP_TRY(Qmp::connect(vm.record.qmp));
    const nlohmann::json status = VMSNAP_TRY(qmp.execute("query-status"));
    if (status.is_object() && !status.value("running", false)) VMSNAP_TRY(qmp.execute("cont"));
  }
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

}  // namespace

Status reattach_vm(const ReattachOptions& options, CommandContext& context) {
  install_interrupt_handlers();
  const auto started = std::chrono::steady_clock::now();
  RunDir dir = VMSNAP_TRY(RunDir::open(options.run_dir));
  RestoreRecord record = VMSNAP_TRY(dir.read());
  if (record.clone) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("{} is the directory of one clone", dir.path()))
            .with_remedy("Give --reattach the farm's directory, the one above."));
  }
  auto process = find_process(record);
  if (record.phase < RestorePhase::loaded) {
    if (process) kill_and_wait(*process);
    Error error = start_again(record, dir);
    dir.undo();
    return tl::unexpected(std::move(error));
  }
  if (!process) return tl::unexpected(std::move(process).error());
  if (record.phase == RestorePhase::complete) {
    context.out << fmt::format("{} has all of its memory already\n", process->describe());
    return {};
  }

  auto image = VMSNAP_TRY(open_image({record.image, {.directory = {}, .key = options.key}, {}}));
  if (image->info().id != record.image_id) {
    return fail(ErrorCode::damaged,
                "{} is not the image that this VM was restored from ({}, not {})", record.image,
                image->info().id, record.image_id);
  }
  VMSNAP_CHECK(check_ranges(record, image->page_count()));
  if (record.uffd < 0) return fail(ErrorCode::damaged, "restore.json names no userfaultfd");
  auto uffd = process->take_descriptor(record.uffd);
  if (!uffd || !is_userfaultfd(*uffd)) {
    if (record.phase != RestorePhase::filled) {
      if (!uffd) return tl::unexpected(std::move(uffd).error());
      return fail(ErrorCode::damaged, "descriptor {} of {} is no userfaultfd", record.uffd,
                  process->describe());
    }
    // The predecessor closed it, and died before it wrote that down.
    record.phase = RestorePhase::complete;
    context.out << fmt::format("{} has all of its memory already\n", process->describe());
    return dir.write(record);
  }
  PageMarks marks = VMSNAP_TRY(PageMarks::open(dir.file("pages"), image->page_count()));

  ServedVm vm{std::move(dir),
              std::move(record),
              std::move(image),
              *std::move(process),
              Uffd::adopt(*std::move(uffd)),
              std::move(marks)};
  vm.record.server_pid = ::getpid();
  if (options.prefetch) vm.record.prefetch = *options.prefetch;
  VMSNAP_CHECK(vm.dir.write(vm.record));
  if (vm.record.record_working_set) go_on_recording(vm);
  std::unique_ptr<Serving> serving = Serving::start(vm);
  VMSNAP_CHECK(resume_if_due(vm));
  return serve_to_end(vm, std::move(serving), {options.detach, options.json, started}, context);
}

}  // namespace vmsnap
