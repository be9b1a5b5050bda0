#include "snap/vmm/device_state.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <string_view>

namespace vmsnap {

namespace {
constexpr off_t max_state_bytes = 256 << 20;
}

namespace {

constexpr std::string_view opaque = "vmsnap ";  // and our number

bool is_of_the_dead(const nlohmann::json& descriptor) {
  const std::string text = text_of(descriptor, "opaque");
  if (!text.starts_with(opaque)) return false;
  const pid_t pid = std::atoi(text.c_str() + opaque.size());
  return pid > 0 && ::kill(pid, 0) < 0 && errno == ESRCH;
}

// What was left by one of us that was killed, or whose VM was paused. A monitor that is
// closed takes them along; libvirt never closes its own.
void release_those_of_the_dead(Qmp& qmp) {
  const auto sets = qmp.execute("query-fdsets");
  if (!sets || !sets->is_array()) return;
  for (const auto& set : *sets) {
    if (!set.is_object() || !set.contains("fdset-id") || !set["fdset-id"].is_number_integer() ||
        !set.contains("fds") || !set["fds"].is_array()) {
      continue;
    }
    if (set["fds"].empty() || !std::ranges::all_of(set["fds"], is_of_the_dead)) continue;
    (void)qmp.execute("remove-fd", {{"fdset-id", set["fdset-id"]}});
  }
}

}  // namespace

Result<DeviceStateTarget> DeviceStateTarget::prepare(Qmp& qmp) {
  release_those_of_the_dead(qmp);
  DeviceStateTarget target;
  target.memory_ = Fd(::memfd_create("vmsnap-device-state", MFD_CLOEXEC));
  if (!target.memory_) return fail_errno(errno, "cannot make a memory file");
  // QEMU takes a descriptor of a set only if its access mode is the one it
  // opens with: write only.
  const Fd writable =
      VMSNAP_TRY(open_file(fmt::format("/proc/self/fd/{}", target.memory_.get()), O_WRONLY));
  const auto answer = VMSNAP_TRY(qmp.execute("add-fd", {{"opaque", fmt::format("{}{}", opaque, ::getpid())}}, {writable.get()}));
  if (!answer.is_object() || !answer.contains("fdset-id") ||
      !answer["fdset-id"].is_number_integer()) {
    return fail(ErrorCode::vm, "{}: add-fd gave no set", qmp.name());
  }
  target.set_ = answer["fdset-id"].get<int64_t>();
  return target;
}

Result<std::vector<std::byte>> DeviceStateTarget::save(Qmp& qmp) {
  VMSNAP_TRY(qmp.execute("xen-save-devices-state",
                         {{"filename", fmt::format("/dev/fdset/{}", set_)}, {"live", false}}));
  struct stat about = {};
  if (::fstat(memory_.get(), &about) < 0) return fail_errno(errno, "cannot read the device state");
  if (about.st_size <= 0 || about.st_size > max_state_bytes) {
    return fail(ErrorCode::vm, "QEMU wrote {} bytes of device state", about.st_size);
  }
  std::vector<std::byte> state(static_cast<size_t>(about.st_size));
  VMSNAP_CHECK(read_exact_at(memory_.get(), state, 0, "the device state"));
  // QEMU may keep it for long.
  (void)!::ftruncate(memory_.get(), 0);
  return state;
}

Status DeviceStateTarget::release(Qmp& qmp) {
  VMSNAP_TRY(qmp.execute("remove-fd", {{"fdset-id", set_}}));
  return {};
}

}  // namespace vmsnap
