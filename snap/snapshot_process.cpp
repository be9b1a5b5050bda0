#include <algorithm>

#include "formats/metadata.h"
#include "formats/test_point.h"
#include "snap/pause_command.h"
#include "snap/snapshot.h"
#include "snap/snapshot_job.h"
#include "snap/vmm/preflight.h"
#include "snap/vmm/thread_stop.h"

namespace vmsnap {

namespace {

Result<std::vector<MemoryBlock>> to_memory_blocks(std::vector<RemoteRange> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const RemoteRange& a, const RemoteRange& b) { return a.start < b.start; });
  std::vector<MemoryBlock> blocks;
  for (const RemoteRange& range : ranges) {
    if (!blocks.empty() && blocks.back().range.end() > range.start) {
      return fail(ErrorCode::usage, "the ranges overlap at {:#x}", range.start.address());
    }
    blocks.push_back({fmt::format("range{}", blocks.size()), range, range.start.address(), 0});
  }
  return blocks;
}

}  // namespace

namespace {

Result<SnapshotSummary> run(SnapshotJob& job, std::vector<MemoryBlock> blocks,
                            const SnapshotOptions& options) {
  const Process& process = job.process();
  const nlohmann::json source = {
      {"kind", "process"},
      {"name", process.describe()},
      {"executable", VMSNAP_TRY(process.executable())},
      {"arguments", VMSNAP_TRY(process.arguments())},
  };
  VMSNAP_CHECK(check_no_asynchronous_io(process));
  VMSNAP_CHECK(job.prepare(std::move(blocks), nullptr, process.describe()));
  VMSNAP_CHECK(job.arm_again());
  job.pause_begins();
  {
    // The kernel lets the threads go if we die in here.
    ThreadStop stopped = VMSNAP_TRY(ThreadStop::stop(process));
    VMSNAP_TEST_POINT("pause.stopped");
    if (!options.pause_command.empty()) {
      VMSNAP_CHECK(run_pause_command(options.pause_command,
                                     {"VMSNAP_ID=" + job.id(), fmt::format("VMSNAP_PID={}", process.pid())},
                                     options.pause_command_limit));
    }
    VMSNAP_CHECK(check_no_asynchronous_io(process));  // nor since
    VMSNAP_CHECK(job.arm());
  }
  job.pause_ended();
  return job.finish(source, {});
}

}  // namespace

Result<SnapshotSummary> snapshot_process(pid_t pid, std::vector<RemoteRange> ranges,
                                         const SnapshotOptions& options,
                                         const SnapshotProgress& progress) {
  VMSNAP_TEST_POINT("snapshot.start");
  VMSNAP_CHECK(check_tags(options.tags, options.dedup_domain));
  auto blocks = VMSNAP_TRY(to_memory_blocks(std::move(ranges)));
  const Process process = VMSNAP_TRY(Process::open(pid));
  // The job ends, and lets the process go, before we ask what an error meant.
  const auto summary = [&] {
    SnapshotJob job(process, options, progress);
    return run(job, std::move(blocks), options);
  }();
  return summary.map_error([&](Error error) { return process.explain(std::move(error)); });
}

}  // namespace vmsnap
