#include "snap/vmm/memory_overlay.h"

#include <sys/mman.h>
#include <sys/syscall.h>

#include <algorithm>
#include <filesystem>

#include "snap/vmm/injector.h"
#include "snap/vmm/memory_map.h"

namespace vmsnap {

namespace {

constexpr const char* qmp_name = "vmsnap-memory";
enum OverlayAnswer : int64_t { give_access = 0, stop_there = 1 };

// What was asked for by madvise(2) on the mapping that goes.
std::vector<int> advice_of(const std::vector<Mapping>& mappings, RemoteRange range) {
  std::vector<int> advice;
  for (const Mapping& mapping : mappings) {
    if (mapping.range.start >= range.end() || mapping.range.end() <= range.start) continue;
    if (mapping.has_flag("dc")) advice.push_back(MADV_DONTFORK);
    if (mapping.has_flag("dd")) advice.push_back(MADV_DONTDUMP);
    if (mapping.has_flag("mg")) advice.push_back(MADV_MERGEABLE);
    break;
  }
  return advice;
}

// The numbers under which the process has `file` open.
Result<std::vector<int>> numbers_of(const Process& process, int file) {
  std::error_code failed;
  const std::string wanted =
      std::filesystem::read_symlink(fmt::format("/proc/self/fd/{}", file), failed).string();
  if (failed) return fail_errno(failed.value(), "cannot look at a descriptor");
  std::vector<int> numbers;
  for (const auto& [number, target] : VMSNAP_TRY(process.descriptors())) {
    if (target == wanted) numbers.push_back(number);
  }
  return numbers;
}

struct Errand {
  std::vector<Overlay> overlays;
  std::vector<std::vector<int>> advice;  // of each
  uint64_t file = 0;                     // its number in the VMM

  Result<int64_t> map_all(RemoteThread& thread) const {
    for (const Overlay& overlay : overlays) {
      const uint64_t start = overlay.range.start.address();
      const int64_t mapped = VMSNAP_TRY(
          thread.call(SYS_mmap, {start, overlay.range.length, PROT_NONE,
                                 MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file, overlay.offset}));
      if (mapped != static_cast<int64_t>(start)) return mapped < 0 ? mapped : -ENOMEM;
    }
    return 0;
  }

  Result<int64_t> open_all(RemoteThread& thread) const {
    for (size_t i = 0; i < overlays.size(); ++i) {
      const uint64_t start = overlays[i].range.start.address(), length = overlays[i].range.length;
      for (const int one : advice[i]) {
        VMSNAP_TRY(thread.call(SYS_madvise, {start, length, static_cast<uint64_t>(one)}));
      }
      const int64_t opened =
          VMSNAP_TRY(thread.call(SYS_mprotect, {start, length, PROT_READ | PROT_WRITE}));
      if (opened < 0) return opened;
    }
    return 0;
  }
};

}  // namespace

Status overlay_memory(const Process& process, Qmp& qmp, int file,
                      const std::vector<Overlay>& overlays, const std::function<Status()>& watch) {
  const std::vector<Mapping> mappings = VMSNAP_TRY(read_memory_map(process));
  Errand errand;
  errand.overlays = overlays;
  for (const Overlay& overlay : overlays) {
    VMSNAP_TRY(mappings_of(mappings, overlay.range));  // refuses holes
    errand.advice.push_back(advice_of(mappings, overlay.range));
  }

  VMSNAP_TRY(qmp.execute("getfd", {{"fdname", qmp_name}}, {file}));
  const std::vector<int> numbers = VMSNAP_TRY(numbers_of(process, file));
  if (numbers.empty()) {
    return fail(ErrorCode::vm, "{} took no descriptor over its monitor", process.describe());
  }
  errand.file = static_cast<uint64_t>(numbers.front());
  Status watched;
  const int64_t done = VMSNAP_TRY(run_injected(
      process,
      [&](RemoteThread& thread, InjectorLink& link) -> Result<int64_t> {
        const int64_t mapped = VMSNAP_TRY(errand.map_all(thread));
        if (mapped < 0 || link.ask(0, stop_there) == stop_there) return mapped;
        return errand.open_all(thread);
      },
      [&](int64_t) -> int64_t {
        watched = watch();
        return watched ? give_access : stop_there;
      }));
  VMSNAP_CHECK(watched);
  if (done < 0) {
    return fail_errno(static_cast<int>(-done), "{} cannot map the shared memory",
                      process.describe());
  }
  VMSNAP_TRY(qmp.execute("closefd", {{"fdname", qmp_name}}));
  return {};
}

}  // namespace vmsnap
