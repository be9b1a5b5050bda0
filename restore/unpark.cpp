#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <thread>

#include "formats/elapsed.h"
#include "formats/json.h"
#include "formats/test_point.h"
#include "restore/park.h"
#include "restore/reattach.h"
#include "restore/run_dir.h"
#include "snap/vmm/process.h"

namespace vmsnap {

namespace {

namespace fs = std::filesystem;

// The run directory in the default place of a VM that is parked. Its monitor is
// not asked: it may wait for a page.
Result<std::string> find_run_dir(const std::string& qmp) {
  std::error_code failed;
  const std::string socket = fs::canonical(qmp, failed).string();
  if (failed) return fail_errno(failed.value(), "cannot find the socket {}", qmp);
  const std::string parent = VMSNAP_TRY(default_run_directories());
  for (const auto& entry : fs::directory_iterator(parent, failed)) {
    const auto record = read_restore_record(entry.path().string());
    if (!record || !record->of_parked_vm || record->qmp != socket) continue;
    if (record->phase == RestorePhase::complete || !find_process(*record)) continue;
    return entry.path().string();
  }
  return tl::unexpected(
      Error(ErrorCode::vm, fmt::format("no VM with the monitor {} is parked in {}", socket, parent))
          .with_remedy("If it was parked with --run-dir, give that directory."));
}

// The way to tell a parked VM's page server; none if there is no server that
// waits for it.
Result<Fd> server_of(const std::string& run_dir) {
  const std::string name = run_dir + "/control";
  Fd control(::open(name.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW));
  if (control || errno == ENXIO || errno == ENOENT) return control;
  return fail_errno(errno, "cannot open {}", name);
}

enum class Told { done, no_server };

// The guest first: its faults are served already. A signal does not end the waiting,
// which is short: it may be what we are here for.
Result<Told> tell_server(const std::string& run_dir, const RestoreRecord& record) {
  Fd control = VMSNAP_TRY(server_of(run_dir));
  if (!control) return Told::no_server;
  if (record.resume) VMSNAP_CHECK(resume_vm(record.qmp));
  VMSNAP_TEST_POINT("unpark.resumed");
  constexpr char word = 'u';
  if (::write(control.get(), &word, 1) < 0 && errno != EPIPE) {
    return fail_errno(errno, "cannot write into {}/control", run_dir);
  }
  control.reset();
  constexpr std::chrono::seconds limit{10};
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (std::chrono::steady_clock::now() < deadline) {
    if (VMSNAP_TRY(read_restore_record(run_dir)).phase != RestorePhase::parked) return Told::done;
    if (!VMSNAP_TRY(server_of(run_dir))) {
      // It took the word a moment ago, or it is dead.
      if (RunDir::open(run_dir)) return Told::no_server;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return tl::unexpected(
      Error(ErrorCode::io, fmt::format("the page server (process {}) does not answer", record.server_pid))
          .with_remedy("Its VM runs. End that process, then unpark again."));
}

}  // namespace

Status unpark_by_server(const std::string& run_dir, const RestoreRecord& record) {
  if (VMSNAP_TRY(tell_server(run_dir, record)) == Told::done) return {};
  return fail(ErrorCode::vm, "no page server waits in {}", run_dir);
}

Status unpark_vm(const UnparkOptions& options, CommandContext& context) {
  const auto started = std::chrono::steady_clock::now();
  const std::string run_dir =
      options.run_dir.empty() ? VMSNAP_TRY(find_run_dir(options.qmp)) : options.run_dir;
  const RestoreRecord record = VMSNAP_TRY(read_restore_record(run_dir));
  if (!record.of_parked_vm) {
    return tl::unexpected(Error(ErrorCode::usage, fmt::format("{} is of a restored VM", run_dir))
                              .with_remedy("See vmsnap restore --reattach."));
  }
  if (record.phase == RestorePhase::parked &&
      VMSNAP_TRY(tell_server(run_dir, record)) == Told::done) {
    const double ms = ms_since(started);
    if (options.json) {
      const nlohmann::json summary = {{"run_dir", run_dir},
                                      {"pid", record.pid},
                                      {"server_pid", record.server_pid},
                                      {"resumed", record.resume},
                                      {"ready_ms", ms}};
      print_json(context.out, summary);
    } else {
      context.out << fmt::format(
          "process {} {} after {:.1f} ms; process {} loads the rest of its memory\n", record.pid,
          record.resume ? "runs" : "is paused, as it was,", ms, record.server_pid);
    }
    return {};
  }
  return reattach_vm({.run_dir = run_dir,
                      .detach = true,
                      .json = options.json,
                      .key = options.key,
                      .unpark = true},
                     context);
}

}  // namespace vmsnap
