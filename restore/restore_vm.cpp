#include "restore/restore_vm.h"

#include <filesystem>

#include "formats/json.h"
#include "formats/log.h"
#include "formats/text.h"
#include "restore/guest_ram.h"
#include "snap/vmm/handover.h"
#include "snap/vmm/ram_blocks.h"

namespace vmsnap {

namespace {

Status take_memory(ServedVm& vm, Qmp& qmp) {
  auto blocks = VMSNAP_TRY(
      match_blocks(vm.image->info().regions, VMSNAP_TRY(read_ram_blocks(qmp, vm.process))));
  HandedUffd handed =
      VMSNAP_TRY(bring_out_uffd(vm.process, &qmp, VMSNAP_TRY(wanted_features()), KeepInVmm::yes));
  vm.uffd = std::move(handed.uffd);
  vm.record.uffd = handed.remote_fd;
  vm.record.ranges = VMSNAP_TRY(watch_memory(vm.uffd, vm.process, std::move(blocks)));
  vm.marks = VMSNAP_TRY(PageMarks::create(vm.dir.file("pages"), vm.image->page_count()));
  const uint64_t present =
      VMSNAP_TRY(overwrite_present_pages(vm.process, *vm.image, vm.record.ranges, vm.marks));
  log_debug("{} pages were there before the restore", present);
  return {};
}

}  // namespace

Status restore_vm(const RestoreOptions& options, CommandContext& context) {
  const auto started = std::chrono::steady_clock::now();
  VmStart start(options, VMSNAP_TRY(open_image(options.image)), started);
  std::unique_ptr<Serving> serving;
  VmStartHooks hooks;
  hooks.take_memory = [&](ServedVm& vm, Qmp& qmp) -> Status {
    VMSNAP_CHECK(take_memory(vm, qmp));
    serving = Serving::start(vm);
    return {};
  };
  hooks.let_go = [&] { serving.reset(); };
  VMSNAP_CHECK(start.run(hooks));
  return serve_to_end(start.vm(), std::move(serving), {options.detach, options.json, started},
                      context);
}

Status print_launch_line(const RestoreOptions& options, CommandContext& context) {
  const auto image = VMSNAP_TRY(open_image(options.image));
  LaunchRequest request = VMSNAP_TRY(launch_request(options, *image));
  request.run_dir = options.run_dir.empty() ? "/run/vmsnap/vmsnap-XXXXXX"
                                            : std::filesystem::absolute(options.run_dir).string();
  const LaunchLine line = VMSNAP_TRY(derive_launch_line(request));
  if (options.json) {
    const nlohmann::json array = line.arguments;
    print_json(context.out, array);
  } else {
    context.out << shell_quoted(line) << "\n";
  }
  return {};
}

}  // namespace vmsnap
