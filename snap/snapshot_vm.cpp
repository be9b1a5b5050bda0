#include <fmt/ranges.h>

#include "formats/log.h"
#include "formats/test_point.h"
#include "snap/pause_command.h"
#include "snap/snapshot.h"
#include "snap/snapshot_job.h"
#include "snap/vmm/device_state.h"
#include "snap/vmm/preflight.h"
#include "snap/vmm/qmp.h"
#include "snap/vmm/ram_blocks.h"
#include "snap/vmm/vm_record.h"

namespace vmsnap {

namespace {

// A monitor that takes longer for one of the pause's commands is not to be
// waited for while the guest stands still.
constexpr std::chrono::seconds pause_answer_limit{5};

// The VM stands still while this lives. A VM that was paused before is left so.
class VmPause {
 public:
  VmPause(Qmp& qmp, SnapshotJob& job, bool was_running)
      : qmp_(qmp), job_(job), was_running_(was_running) {}
  ~VmPause() {
    if (begun_) (void)end();
  }

  Status begin() {
    VMSNAP_CHECK(job_.pause_begins(/*resume_if_we_die=*/was_running_));
    begun_ = true;
    if (was_running_) VMSNAP_TRY(qmp_.execute("stop"));
    VMSNAP_TEST_POINT("pause.stopped");
    return {};
  }

  Status end() {
    begun_ = false;
    if (was_running_) {
      // Once more if it does not answer: nothing matters more than this.
      auto answer = qmp_.execute("cont");
      if (!answer) answer = qmp_.execute("cont");
      if (!answer) {
        // The guard has another try when we are gone.
        return tl::unexpected(
            std::move(answer).error().with_context("the VM could not be resumed").with_remedy(
                "Resume it by hand: send 'cont' to its monitor."));
      }
    }
    job_.pause_ended();
    return {};
  }

  // The VM stays as it is, whatever becomes of us.
  void keep() {
    begun_ = false;
    job_.pause_ended();
  }

 private:
  Qmp& qmp_;
  SnapshotJob& job_;
  bool was_running_;
  bool begun_ = false;
};

Result<VmRecord> record_vm(Qmp& qmp, const Process& process) {
  VmRecord record;
  record.executable = VMSNAP_TRY(process.executable());
  // The package was upgraded under the running VM.
  constexpr std::string_view deleted = " (deleted)";
  if (record.executable.ends_with(deleted)) {
    record.executable.resize(record.executable.size() - deleted.size());
  }
  record.arguments = VMSNAP_TRY(process.arguments());
  record.working_directory = VMSNAP_TRY(process.working_directory());
  const auto name = VMSNAP_TRY(qmp.execute("query-name"));
  record.name = name.is_object() ? name.value("name", std::string()) : std::string();
  if (record.name.empty()) record.name = fmt::format("qemu-{}", process.pid());
  if (const auto type = qmp.execute("qom-get", {{"path", "/machine"}, {"property", "type"}});
      type && type->is_string()) {
    record.machine = type->get<std::string>();
    constexpr std::string_view suffix = "-machine";
    if (record.machine.ends_with(suffix)) record.machine.resize(record.machine.size() - suffix.size());
  }
  const auto version = VMSNAP_TRY(qmp.execute("query-version"));
  if (version.is_object() && version.contains("qemu") && version["qemu"].is_object()) {
    const auto& qemu = version["qemu"];
    record.qemu_version = fmt::format("{}.{}.{}", qemu.value("major", 0), qemu.value("minor", 0),
                                      qemu.value("micro", 0));
  }
  return record;
}

Status check_disks(Qmp& qmp, const SnapshotOptions& options) {
  if (options.without_disks) return {};
  const std::vector<std::string> disks = VMSNAP_TRY(writable_disks(qmp));
  if (disks.empty()) return {};
  return tl::unexpected(
      Error(ErrorCode::refused,
            fmt::format("the VM has writable disks, which this image would not hold: {}",
                        fmt::join(disks, ", ")))
          .with_remedy("Give --disks none if you take care of them yourself, for instance with "
                       "--in-pause and an LVM or ZFS snapshot."));
}

std::vector<MemoryBlock> to_memory_blocks(const std::vector<RamBlock>& blocks) {
  std::vector<MemoryBlock> memory;
  for (const RamBlock& block : blocks) {
    memory.push_back({block.name, {block.host, block.length}, block.guest_address, 0});
  }
  return memory;
}

Result<SnapshotSummary> run(SnapshotJob& job, Qmp& qmp, const SnapshotOptions& options) {
  VmRecord record = VMSNAP_TRY(record_vm(qmp, job.process()));
  VMSNAP_CHECK(job.wait_for_restore(to_memory_blocks(VMSNAP_TRY(read_ram_blocks(qmp, job.process())))));
  const GuestState state = VMSNAP_TRY(check_guest_state(qmp));
  record.was_running = state.running;
  VMSNAP_CHECK(check_migration(qmp));
  VMSNAP_CHECK(check_disks(qmp, options));
  const auto blocks = VMSNAP_TRY(read_ram_blocks(qmp, job.process()));
  VMSNAP_CHECK(job.prepare(to_memory_blocks(blocks), &qmp, record.name));

  DeviceStateTarget target = VMSNAP_TRY(DeviceStateTarget::prepare(qmp));
  std::vector<std::byte> device_state;
  const auto in_pause = [&]() -> Status {
    device_state = VMSNAP_TRY(target.save(qmp));
    VMSNAP_TEST_POINT("pause.state_saved");
    if (!options.pause_command.empty()) {
      VMSNAP_CHECK(run_pause_command(options.pause_command,
                                     {"VMSNAP_ID=" + job.id(), "VMSNAP_VM=" + record.name,
                                      fmt::format("VMSNAP_PID={}", job.process().pid())},
                                     options.pause_command_limit));
    }
    return job.arm();
  };
  qmp.set_limit(pause_answer_limit);
  VmPause pause(qmp, job, state.running);
  Status paused = pause.begin();
  if (paused) paused = in_pause();
  const bool stay = options.stay_paused && paused;
  const Status resumed = stay ? Status() : pause.end();
  if (const Status released = target.release(qmp); !released) {
    log_warning("{}", released.error().message());
  }
  if (!resumed && !paused) log_warning("{}", paused.error().message());
  VMSNAP_CHECK(resumed);
  VMSNAP_CHECK(paused);
  // Others may use the monitor from here on, unless it is to resume the VM yet.
  if (!stay) qmp.close();
  auto summary = job.finish(to_json(record), device_state);
  if (stay && summary) pause.keep();
  return summary;
}

}  // namespace

Result<SnapshotSummary> snapshot_vm(const std::string& qmp_socket, const SnapshotOptions& options,
                                    const SnapshotProgress& progress) {
  VMSNAP_TEST_POINT("snapshot.start");
  Qmp qmp = VMSNAP_TRY(Qmp::connect(qmp_socket));
  const Process process = VMSNAP_TRY(Process::open(VMSNAP_TRY(qmp.peer_pid())));
  // The job ends, and lets the VM go, before we ask what an error meant.
  const auto summary = [&] {
    SnapshotJob job(process, options, progress);
    return run(job, qmp, options);
  }();
  return summary.map_error([&](Error error) { return process.explain(std::move(error)); });
}

}  // namespace vmsnap
