// The program: parses, runs what was asked for, prints the error, exits.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <iostream>

#include "formats/command.h"
#include "formats/interrupt.h"
#include "formats/log.h"
#include "formats/processors.h"
#include "formats/store/key_command.h"
#include "formats/store/store_commands.h"
#include "restore/park_commands.h"
#include "restore/restore_commands.h"
#include "snap/backup.h"
#include "snap/progress.h"
#include "snap/snapshot.h"
#include "snap/snapshot_command.h"

namespace {

using namespace vmsnap;

int report(const Error& error) {
  std::cerr << "vmsnap: " << error.message() << "\n";
  if (!error.remedy().empty()) std::cerr << "  " << error.remedy() << "\n";
  return exit_status(error.code());
}

// The half of `park` that is the capture engine's.
Result<ParkImage> take_park_image(const ParkImageRequest& request, CommandContext& context) {
  SnapshotOptions options;
  options.output = request.output;
  options.replace_output = request.replace_output;
  options.store = request.store.options();
  options.dedup_domain = request.dedup_domain;
  options.tags = request.tags;
  options.cpus = default_threads();
  // The VM lives on with the disks that it has.
  options.without_disks = true;
  options.stay_paused = true;
  // It is to stand still; this only ends a park that does so itself.
  options.stall_limit = std::chrono::minutes(10);
  ProgressLine line(context.err, context.terminal);
  const auto summary =
      snapshot_vm(request.qmp, options, [&](SnapshotPhase phase, const CaptureCounters* counters) {
        line.show(phase, counters);
      });
  line.clear();
  if (!summary) return tl::unexpected(summary.error());
  return ParkImage{summary->file, summary->id};
}

// Whoever started us may have closed the first three descriptors. The next file
// that is opened would get such a number, and then be taken for the terminal: what
// is written there would go into an image, and the background (restore/background.h)
// would replace it. In ascending order, since open(2) takes the lowest that is free.
// Standard output for reading only: an export to it must fail.
struct StandardDescriptors {
  bool all_open = true;
  bool had_output = true;
};

StandardDescriptors open_standard_descriptors() {
  StandardDescriptors found;
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; ++fd) {
    if (::fcntl(fd, F_GETFD) >= 0) continue;
    if (fd == STDOUT_FILENO) found.had_output = false;
    if (::open("/dev/null", fd == STDOUT_FILENO ? O_RDONLY : O_RDWR) != fd) found.all_open = false;
  }
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  // Without this nothing may be opened, and there may be nowhere to say so.
  const StandardDescriptors standard = open_standard_descriptors();
  if (!standard.all_open) return exit_status(ErrorCode::io);
  ::signal(SIGPIPE, SIG_IGN);
  ::signal(SIGXFSZ, SIG_IGN);  // a file size limit is an error value, like a full disk
  install_interrupt_handlers();
  set_log_sink([](LogLevel level, std::string_view line) {
    if (level >= LogLevel::info) std::cerr << "vmsnap: " << line << "\n";
  });

  CommandContext context{.out = std::cout, .err = std::cerr, .terminal = ::isatty(STDERR_FILENO) != 0, .run = {}};
  CLI::App app{"Snapshots of running virtual machines, restored lazily", "vmsnap"};
  app.require_subcommand(1);
  app.set_version_flag("--version", "vmsnap " VMSNAP_VERSION);
  add_snapshot_command(app, context);
  add_restore_commands(app, context);
  add_park_commands(app, context, take_park_image);
  add_image_commands(app, context);
  add_store_commands(app, context);
  add_key_command(app, context);
  add_backup_command(app, context);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // Zero for --help and --version; CLI11's own numbers are not ours.
    return app.exit(error) == 0 ? 0 : exit_status(ErrorCode::usage);
  }
  const Status done = context.run();
  std::cout.flush();
  if (!done) return report(done.error());
  if (!std::cout && standard.had_output) return report(Error(ErrorCode::io, "cannot write to standard output"));
  return 0;
}
