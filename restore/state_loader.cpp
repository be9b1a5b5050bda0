#include "restore/state_loader.h"

#include <sys/mman.h>

#include <cerrno>
#include <thread>

#include "formats/file.h"
#include "formats/interrupt.h"
#include "formats/test_point.h"

namespace vmsnap {

namespace {

constexpr const char* descriptor_name = "vmsnap-device-state";

// A file in memory that holds the state, to be read from its start. Unlike a
// pipe it needs nobody to feed it, so nobody who could hang with QEMU.
Result<Fd> as_file(std::span<const std::byte> state) {
  Fd file(::memfd_create("vmsnap-device-state", MFD_CLOEXEC));
  if (!file) return fail_errno(errno, "cannot make a file in memory");
  VMSNAP_CHECK(write_all_at(file.get(), state, 0, "the device state"));
  return file;
}

Result<bool> is_loaded(Qmp& qmp) {
  const nlohmann::json migration = VMSNAP_TRY(qmp.execute("query-migrate"));
  const std::string status = text_of(migration, "status");
  if (status == "failed") {
    const std::string why = text_of(migration, "error-desc");
    return fail(ErrorCode::vm, "QEMU refused the device state: {}",
                why.empty() ? "it gave no reason" : why);
  }
  if (status != "completed") return false;
  const nlohmann::json vm = VMSNAP_TRY(qmp.execute("query-status"));
  return text_of(vm, "status") != "inmigrate";
}

}  // namespace

Status load_device_state(Qmp& qmp, std::span<const std::byte> state, std::chrono::seconds limit) {
  const Fd file = VMSNAP_TRY(as_file(state));
  VMSNAP_TRY(qmp.execute("getfd", {{"fdname", descriptor_name}}, {file.get()}));
  const auto deadline = std::chrono::steady_clock::now() + limit;
  VMSNAP_TRY(qmp.execute("migrate-incoming", {{"uri", fmt::format("fd:{}", descriptor_name)}}));
  VMSNAP_TEST_POINT("restore.loading");
  for (;;) {
    VMSNAP_CHECK(check_interrupted());
    if (VMSNAP_TRY(is_loaded(qmp))) return {};
    if (std::chrono::steady_clock::now() > deadline) {
      return fail(ErrorCode::vm, "QEMU has not loaded the device state within {} s", limit.count());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

}  // namespace vmsnap
