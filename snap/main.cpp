// The program: parses, runs what was asked for, prints the error, exits.
#include <signal.h>
#include <unistd.h>

#include <iostream>

#include "formats/command.h"
#include "formats/interrupt.h"
#include "formats/log.h"
#include "formats/store/key_command.h"
#include "formats/store/store_commands.h"
#include "restore/restore_commands.h"
#include "snap/backup.h"
#include "snap/snapshot_command.h"

namespace {

using namespace vmsnap;

int report(const Error& error) {
  std::cerr << "vmsnap: " << error.message() << "\n";
  if (!error.remedy().empty()) std::cerr << "  " << error.remedy() << "\n";
  return exit_status(error.code());
}

}  // namespace

int main(int argc, char** argv) {
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
  if (!std::cout) return report(Error(ErrorCode::io, "cannot write to standard output"));
  return 0;
}
