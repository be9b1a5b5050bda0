#include <fmt/ranges.h>

#include <chrono>
#include <cstdlib>

#include "formats/log.h"
#include "formats/metadata.h"
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

// For an event that may be late, when most likely there is none; and when there is.
constexpr std::chrono::milliseconds likely_here{300};
constexpr std::chrono::seconds surely_here{2};

// What the clock on the wall is ahead of one that is never set, in microseconds.
int64_t wall_clock_offset() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return Qmp::unix_us() - std::chrono::duration_cast<std::chrono::microseconds>(now).count();
}
constexpr int64_t clock_was_set_us = 500;

// The VM stands still while this lives. A VM that was paused before is left so.
// Others may stop and resume it through monitors of their own at any time.
class VmPause {
 public:
  VmPause(Qmp& qmp, SnapshotJob& job) : qmp_(qmp), job_(job) {}
  ~VmPause() {
    if (begun_) (void)end();
  }

  Status begin() {
    VMSNAP_CHECK(job_.arm_again());
    was_running_ = VMSNAP_TRY(check_guest_state(qmp_)).running;
    if (was_running_) job_.resume_if_we_die();
    job_.pause_begins();
    begun_ = true;
    const uint64_t stops = qmp_.stops();
    clock_offset_ = wall_clock_offset();
    qmp_.mark();
    // Also if it was paused: it may not be any more.
    VMSNAP_TRY(qmp_.execute("stop"));
    const auto we_stopped_it = [&] {
      return qmp_.has_late_events() ? qmp_.stopped_since_mark() : qmp_.stops() > stops;
    };
    if (!was_running_ && qmp_.has_late_events()) {
      VMSNAP_CHECK(qmp_.read_events(likely_here, we_stopped_it));
    }
    if (!was_running_ && we_stopped_it()) {
      was_running_ = true;
      job_.resume_if_we_die();
    }
    VMSNAP_CHECK(qmp_.read_events());
    resumes_ = qmp_.resumes();
    VMSNAP_TEST_POINT("pause.stopped");
    return {};
  }

  bool was_running() const { return was_running_; }

  // After the instant: the devices' state and the memory are of one.
  Status check_stood_still() {
    VMSNAP_CHECK(qmp_.read_events());
    if (qmp_.has_late_events()) return qmp_.first_resume_since_mark() ? resumed() : Status();
    return qmp_.resumes() == resumes_ ? Status() : resumed();
  }

  // After the end. Events come in their order, and have the time at which QEMU sent
  // them: the first RESUME since our `stop` must be the one of our `cont`.
  Status check_late_events() {
    if (!qmp_.has_late_events()) return {};
    VMSNAP_CHECK(qmp_.read_events(was_running_ ? surely_here : likely_here,
                                  [&] { return qmp_.first_resume_since_mark().has_value(); }));
    const auto first = qmp_.first_resume_since_mark();
    if (first && (!was_running_ || *first < continued_at_)) return resumed();
    if (std::abs(wall_clock_offset() - clock_offset_) > clock_was_set_us) {
      return cannot_tell("the clock was set in the pause");
    }
    return first || !was_running_ ? Status() : cannot_tell("libvirt does not tell that it goes on");
  }

  Status end() {
    begun_ = false;
    // That of our `stop` may have been late.
    if (!was_running_ && qmp_.has_late_events() && qmp_.read_events()) {
      was_running_ = qmp_.stopped_since_mark();
    }
    if (was_running_) {
      continued_at_ = Qmp::unix_us();
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
  static tl::unexpected<Error> resumed() {
    return tl::unexpected(
        Error(ErrorCode::vm, "somebody else resumed the VM while it was to stand still for the snapshot")
            .with_remedy("Take the snapshot again when nobody stops and resumes the VM."));
  }

  static tl::unexpected<Error> cannot_tell(const char* why) {
    return tl::unexpected(
        Error(ErrorCode::vm, fmt::format("whether the VM stood still is not certain: {}", why))
            .with_remedy("Take the snapshot again."));
  }

  Qmp& qmp_;
  SnapshotJob& job_;
  int64_t clock_offset_ = 0, continued_at_ = 0;  // microseconds
  bool was_running_ = false;
  bool begun_ = false;
  uint64_t resumes_ = 0;  // RESUME events until the VM stood still
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
  record.name = text_of(name, "name");
  if (record.name.empty()) record.name = fmt::format("qemu-{}", process.pid());
  if (const auto type = qmp.execute("qom-get", {{"path", "/machine"}, {"property", "type"}});
      type && type->is_string()) {
    record.machine = type->get<std::string>();
    constexpr std::string_view suffix = "-machine";
    if (record.machine.ends_with(suffix)) record.machine.resize(record.machine.size() - suffix.size());
  }
  const auto version = VMSNAP_TRY(qmp.execute("query-version"));
  if (version.is_object() && version.contains("qemu") && version["qemu"].is_object()) {
    const auto number = [&](const char* part) {
      const auto found = version["qemu"].find(part);
      return found != version["qemu"].end() && found->is_number_integer() ? found->get<int>() : 0;
    };
    record.qemu_version =
        fmt::format("{}.{}.{}", number("major"), number("minor"), number("micro"));
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

struct VmMemory {
  std::vector<RamBlockLine> listed;
  std::vector<MemoryBlock> blocks;
};

Result<VmMemory> find_memory(Qmp& qmp, const Process& process) {
  VmMemory memory;
  memory.listed = VMSNAP_TRY(list_ram_blocks(qmp));
  memory.blocks = to_memory_blocks(VMSNAP_TRY(read_ram_blocks(qmp, process)));
  return memory;
}

// That nothing was plugged in or resized between the first look and the instant.
// Asked when the VM runs again, which it need not wait for: what came since fails
// the snapshot too.
Status check_same_blocks(Qmp& qmp, const VmMemory& before) {
  if (VMSNAP_TRY(list_ram_blocks(qmp)) == before.listed) return {};
  return tl::unexpected(
      Error(ErrorCode::vm, "memory was plugged into the VM, or out of it, while the snapshot began")
          .with_remedy("Take the snapshot again."));
}

Result<SnapshotSummary> run(SnapshotJob& job, Qmp& qmp, const SnapshotOptions& options) {
  VmRecord record = VMSNAP_TRY(record_vm(qmp, job.process()));
  VmMemory memory = VMSNAP_TRY(find_memory(qmp, job.process()));
  if (VMSNAP_TRY(job.wait_for_restore(memory.blocks))) {
    memory = VMSNAP_TRY(find_memory(qmp, job.process()));
  }
  VMSNAP_TRY(check_guest_state(qmp));
  VMSNAP_CHECK(check_migration(qmp));
  VMSNAP_CHECK(check_disks(qmp, options));
  VMSNAP_CHECK(job.prepare(memory.blocks, &qmp, record.name));

  DeviceStateTarget target = VMSNAP_TRY(DeviceStateTarget::prepare(qmp));
  std::vector<std::byte> device_state;
  qmp.set_limit(pause_answer_limit);
  VmPause pause(qmp, job);
  const auto in_pause = [&]() -> Status {
    device_state = VMSNAP_TRY(target.save(qmp));
    VMSNAP_TEST_POINT("pause.state_saved");
    if (!options.pause_command.empty()) {
      VMSNAP_CHECK(run_pause_command(options.pause_command,
                                     {"VMSNAP_ID=" + job.id(), "VMSNAP_VM=" + record.name,
                                      fmt::format("VMSNAP_PID={}", job.process().pid())},
                                     options.pause_command_limit));
    }
    VMSNAP_CHECK(job.arm());
    return pause.check_stood_still();
  };
  Status paused = pause.begin();
  if (paused) paused = in_pause();
  const bool stay = options.stay_paused && paused;
  const Status resumed = stay ? Status() : pause.end();
  if (resumed) {
    // Not before: a monitor that does not answer keeps us from nothing more.
    if (const Status released = target.release(qmp); !released) {
      log_warning("{}", released.error().message());
    }
  }
  if (!resumed && !paused) log_warning("{}", paused.error().message());
  // For the guard, which has to connect anew.
  if (!resumed) qmp.close();
  VMSNAP_CHECK(resumed);
  VMSNAP_CHECK(paused);
  VMSNAP_CHECK(pause.check_late_events());
  record.was_running = pause.was_running();
  VMSNAP_CHECK(check_same_blocks(qmp, memory));
  if (options.copy_pinned) VMSNAP_CHECK(check_no_assigned_devices(qmp));  // plugged in since
  // Others may use the monitor from here on, unless it is to resume the VM yet.
  if (!stay) qmp.close();
  auto summary = job.finish(to_json(record), device_state);
  if (stay && summary) pause.keep();
  return summary;
}

}  // namespace

Result<SnapshotSummary> snapshot_vm(const MonitorAddress& monitor, const SnapshotOptions& options,
                                    const SnapshotProgress& progress) {
  VMSNAP_TEST_POINT("snapshot.start");
  VMSNAP_CHECK(check_tags(options.tags, options.dedup_domain));
  Qmp qmp = VMSNAP_TRY(Qmp::connect(monitor, std::chrono::seconds(10), Qmp::Signals::heed));
  const Process process = VMSNAP_TRY(Process::open(VMSNAP_TRY(qmp.peer_pid())));
  // The job ends, and lets the VM go, before we ask what an error meant.
  const auto summary = [&] {
    SnapshotJob job(process, options, progress);
    return run(job, qmp, options);
  }();
  return summary.map_error([&](Error error) { return process.explain(std::move(error)); });
}

}  // namespace vmsnap
