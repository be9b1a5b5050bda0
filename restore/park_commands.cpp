#include "restore/park_commands.h"

#include <CLI/CLI.hpp>
#include <memory>

#include "formats/metadata.h"

namespace vmsnap {

namespace {

Status run_park(const ParkOptions& options, const TakeParkImage& take_image,
                CommandContext& context) {
  if (options.image.output.empty() && options.image.store.directory.empty()) {
    return fail(ErrorCode::usage, "give --output FILE or --store DIR");
  }
  VMSNAP_CHECK(check_key_has_store(options.image.store));
  VMSNAP_CHECK(check_tags(options.image.tags, options.image.dedup_domain));
  if (options.image.store.key.passphrase_fd) {
    return tl::unexpected(
        Error(ErrorCode::usage, "--passphrase-fd can be read once, and park opens the store twice")
            .with_remedy("Give the key by a file or a command."));
  }
  return park_vm(options, take_image, context);
}

void add_park(CLI::App& app, CommandContext& context, TakeParkImage take_image) {
  auto options = std::make_shared<ParkOptions>();
  CLI::App* command = app.add_subcommand(
      "park", "Pause a VM, and hand its memory back to the host until it is touched");
  command->add_option("--qmp", options->image.qmp, "Monitor (QMP) socket of a running QEMU")
      ->type_name("SOCKET")
      ->required();
  auto* output =
      command->add_option("-o,--output", options->image.output, "Image file that holds the memory")
          ->type_name("FILE");
  auto* store = add_store_option(*command, options->image.store)->excludes(output);
  store->description("Store that holds the memory, made if it is not there");
  command->add_option("--tag", options->image.tags, "Word to find the snapshot by (repeatable)")
      ->type_name("TAG")
      ->allow_extra_args(false);
  command->add_option("--dedup-domain", options->image.dedup_domain,
                      "Share pages only with snapshots of the same domain")
      ->type_name("NAME")
      ->needs(store);
  command->add_flag("-f,--force", options->image.replace_output, "Replace FILE if it exists");
  command->add_option("--run-dir", options->run_dir,
                      "Directory for restore.json and the log (default: a new one)")
      ->type_name("DIR");
  command->add_flag("--json", options->json, "Print one JSON object");
  command->footer(
      "Examples:\n"
      "  vmsnap park --qmp /run/vm1.qmp --store /backup/vms --tag parked\n"
      "  vmsnap park --qmp /run/vm1.qmp --output /backup/vm1.img --run-dir /run/vm1.parked\n"
      "  vmsnap unpark --qmp /run/vm1.qmp");
  command->callback([options, take_image = std::move(take_image), &context] {
    context.run = [options, take_image, &context] { return run_park(*options, take_image, context); };
  });
}

void add_unpark(CLI::App& app, CommandContext& context) {
  auto options = std::make_shared<UnparkOptions>();
  CLI::App* command =
      app.add_subcommand("unpark", "Let a parked VM run at once, and bring its memory back");
  auto* run_dir = command
                      ->add_option("--run-dir", options->run_dir,
                                   "The directory that park made or was given")
                      ->type_name("DIR");
  auto* qmp = command->add_option("--qmp", options->qmp, "Its monitor, if park made the directory")
                  ->type_name("SOCKET")
                  ->excludes(run_dir);
  add_key_options(*command, options->key);
  command->add_flag("--json", options->json, "Print one JSON object");
  command->footer(
      "Examples:\n"
      "  vmsnap unpark --qmp /run/vm1.qmp\n"
      "  vmsnap unpark --run-dir /run/vm1.parked");
  command->callback([options, run_dir, qmp, &context] {
    context.run = [options, run_dir, qmp, &context]() -> Status {
      if (run_dir->empty() && qmp->empty()) {
        return fail(ErrorCode::usage, "give --run-dir DIR or --qmp SOCKET");
      }
      return unpark_vm(*options, context);
    };
  });
}

}  // namespace

void add_park_commands(CLI::App& app, CommandContext& context, TakeParkImage take_image) {
  add_park(app, context, std::move(take_image));
  add_unpark(app, context);
}

}  // namespace vmsnap
