#include "restore/farm/clone_process.h"

#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <utility>
#include <vector>

#include "formats/file.h"
#include "formats/interrupt.h"
#include "restore/farm/farm_link.h"
#include "restore/guest_ram.h"
#include "snap/vmm/handover.h"
#include "snap/vmm/memory_overlay.h"
#include "snap/vmm/ram_blocks.h"

namespace vmsnap {

namespace {

Status take_shared_memory(ServedVm& vm, Qmp& qmp, const std::string& farm_socket,
                          const std::string& name) {
  const Fd farm = VMSNAP_TRY(connect_for_messages(farm_socket));
  const LinkMessage memory = VMSNAP_TRY(ask(farm.get(), {{"do", "memory"}}));
  if (memory.descriptors.size() != 1) return fail(ErrorCode::io, "the farm gave no memory");
  const std::vector<MemoryBlock> blocks = VMSNAP_TRY(
      match_blocks(vm.image->info().regions, VMSNAP_TRY(read_ram_blocks(qmp, vm.process))));
  HandedUffd handed =
      VMSNAP_TRY(bring_out_uffd(vm.process, &qmp, VMSNAP_TRY(wanted_features()), KeepInVmm::yes));
  vm.uffd = std::move(handed.uffd);
  vm.record.uffd = handed.remote_fd;
  vm.record.clone = true;
  std::vector<Overlay> overlays;
  for (const MemoryBlock& block : blocks) {
    overlays.push_back({block.range, block.first_page * page_size});
    vm.record.ranges.push_back({block.range, block.first_page, page_size, block.name});
  }
  VMSNAP_CHECK(overlay_memory(vm.process, qmp, memory.descriptors[0].get(), overlays, [&]() -> Status {
    for (const Overlay& overlay : overlays) {
      const auto outcome = VMSNAP_TRY(vm.uffd.register_range(overlay.range, {.missing = true}));
      if (outcome != RegisterOutcome::done) {
        return fail(ErrorCode::refused, "{}: shared memory cannot be watched", vm.process.describe());
      }
    }
    return {};
  }));
  VMSNAP_TRY(PageMarks::create(vm.dir.file("pages"), vm.image->page_count()));
  vm.record.phase = RestorePhase::registered;
  VMSNAP_CHECK(vm.dir.write(vm.record));
  VMSNAP_TRY(ask(farm.get(), {{"do", "join"}, {"clone", name}}, {}, std::chrono::seconds(30)));
  return {};
}

}  // namespace

std::string with_clone_number(std::string text, const std::string& number) {
  constexpr std::string_view place = "{clone}";
  for (size_t at = 0; (at = text.find(place, at)) != std::string::npos; at += number.size()) {
    text.replace(at, place.size(), number);
  }
  return text;
}

nlohmann::json start_clone(RestoreOptions options, const FarmDir& farm, const std::string& name,
                           std::unique_ptr<ImageReader> image,
                           std::chrono::steady_clock::time_point started, CloneChannel channel) {
  options.run_dir = farm.file(name);
  for (Replacement& replacement : options.replacements) {
    replacement.to = with_clone_number(replacement.to, name);
  }
  for (std::string& argument : options.extra) argument = with_clone_number(argument, name);
  VmStart start(options, std::move(image), started);
  VmStartHooks hooks;
  hooks.take_memory = [&](ServedVm& vm, Qmp& qmp) {
    return take_shared_memory(vm, qmp, farm.socket(), name);
  };
  hooks.may_run = [&]() -> Status {
    VMSNAP_CHECK(write_all(channel.report, std::as_bytes(std::span("+", 1)), "a pipe"));
    char word;
    ssize_t got;
    while ((got = ::read(channel.go, &word, 1)) < 0 && errno == EINTR) {
      VMSNAP_CHECK(check_interrupted());
    }
    if (got == 1) return {};
    return fail(ErrorCode::interrupted, "the command that started it is gone");
  };
  const Status ran = start.run(hooks);
  if (!ran) {
    // Its number is free again: who tries once more has prepared disks by number.
    std::error_code ignored;
    std::filesystem::remove_all(options.run_dir, ignored);
    return {{"error", ran.error().message()}, {"remedy", ran.error().remedy()}};
  }
  const RestoreRecord& record = start.vm().record;
  return {{"pid", record.pid},
          {"qmp", record.qmp},
          {"run_dir", options.run_dir},
          {"ready_ms", record.ready_ms}};
}

}  // namespace vmsnap
