#include "restore/restore_commands.h"

#include <CLI/CLI.hpp>
#include <memory>

#include "formats/size.h"
#include "restore/farm/clone_start.h"
#include "restore/farm/clones_command.h"
#include "restore/farm/farm_dir.h"
#include "restore/reattach.h"
#include "restore/restore_vm.h"
#include "restore/serve.h"

namespace vmsnap {

namespace {

struct RestoreArguments {
  RestoreOptions options;
  std::vector<std::string> replacements;
  std::string reattach, prefetch;
  std::string memory;
  unsigned clones = 0;
  bool dry_run = false;
};

void add_prefetch_option(CLI::App& command, std::string& prefetch) {
  command
      .add_option(
          "--prefetch", prefetch,
          "What to load that was not touched: 'none', the 'working-set', or 'all' (default)")
      ->type_name("none|working-set|all")
      ->check(CLI::IsMember({"none", "working-set", "all"}));
}

Status run_restore(RestoreArguments& arguments, CommandContext& context) {
  RestoreOptions& options = arguments.options;
  if (!arguments.prefetch.empty()) {
    options.prefetch = VMSNAP_TRY(parse_prefetch(arguments.prefetch));
  }
  if (!arguments.reattach.empty()) {
    if (!options.image.name.empty() || !options.extra.empty()) {
      return fail(ErrorCode::usage, "--reattach takes the image and the VM from its directory");
    }
    if (FarmDir::open(arguments.reattach)) {
      if (options.prefetch) {
        return fail(ErrorCode::usage, "--prefetch: the clones in {} go on as they were started",
                    arguments.reattach);
      }
      return reattach_farm(arguments.reattach, options.image.store.key, options.json, context);
    }
    return reattach_vm({arguments.reattach, options.prefetch, options.detach, options.json,
                        options.image.store.key},
                       context);
  }
  if (options.image.name.empty()) {
    return tl::unexpected(Error(ErrorCode::usage, "restore wants an image")
                              .with_remedy("See vmsnap restore --help."));
  }
  for (const std::string& text : arguments.replacements) {
    options.replacements.push_back(VMSNAP_TRY(parse_replacement(text)));
  }
  if (arguments.clones > 0 && !arguments.dry_run) {
    if (options.record_working_set) {
      return fail(ErrorCode::usage, "--record-working-set is for a restore of one VM");
    }
    CloneOptions clones{.vm = options, .count = arguments.clones};
    if (!arguments.memory.empty()) clones.memory = VMSNAP_TRY(parse_size(arguments.memory));
    if (!arguments.memory.empty() && clones.memory < (4 << 20)) {
      return fail(ErrorCode::usage, "--memory {}: the shared pages need 4M at least", arguments.memory);
    }
    return start_clones(clones, context);
  }
  if (!arguments.memory.empty() && arguments.clones == 0) {
    return fail(ErrorCode::usage, "--memory is for --clones");
  }
  return arguments.dry_run ? print_launch_line(options, context) : restore_vm(options, context);
}

void add_restore(CLI::App& app, CommandContext& context) {
  auto arguments = std::make_shared<RestoreArguments>();
  CLI::App* command = app.add_subcommand(
      "restore", "Start the VM of an image again; its memory comes as it is touched");
  add_image_argument(*command, arguments->options.image);
  CLI::Option* reattach =
      command->add_option("--reattach", arguments->reattach,
                          "Take over the VM of this run directory, whose page server died");
  command->add_option("--run-dir", arguments->options.run_dir,
                      "Directory for sockets, logs and restore.json (default: a new one)");
  command->add_option("--clones", arguments->clones,
                      "Start so many VMs that share the image's memory; {clone} in arguments is "
                      "the number of each")
      ->check(CLI::Range(1, 512));
  command->add_option("--memory", arguments->memory,
                      "With --clones: keep the shared pages under this size (512M, 2G); cold ones "
                      "come back from the image");
  command
      ->add_option("--replace", arguments->replacements,
                   "OLD=NEW: change text in the recorded arguments; may be given again")
      ->allow_extra_args(false);  // each takes one word, and none takes the "--"
  command->add_option("--qemu", arguments->options.qemu,
                      "Executable to start instead of the recorded one");
  command->add_option("--chdir", arguments->options.chdir,
                      "Directory to start it in instead of the recorded one");
  add_prefetch_option(*command, arguments->prefetch);
  command->add_flag("--record-working-set", arguments->options.record_working_set,
                    "Note which pages are touched first, for later restores of this image");
  command->add_flag("--start-paused", arguments->options.start_paused,
                    "Leave the VM paused when it is loaded");
  command->add_flag("--fix-clock", arguments->options.fix_clock,
                    "Set the guest's clock to the host's, through its guest agent");
  command->add_flag("--detach", arguments->options.detach,
                    "Return when the guest runs; go on in the background");
  command->add_flag("--dry-run", arguments->dry_run,
                    "Print the command line that would be run, and nothing else");
  command->add_flag("--json", arguments->options.json, "Print one JSON object");
  // The VM is there already.
  for (const char* of_a_start :
       {"--store", "--run-dir", "--clones", "--memory", "--replace", "--qemu", "--chdir",
        "--record-working-set", "--start-paused", "--fix-clock", "--dry-run"}) {
    reattach->excludes(command->get_option(of_a_start));
  }
  command->add_option("QEMU_ARGUMENTS", arguments->options.extra,
                      "After --: arguments to add; with the id of a recorded one, to replace it");
  command->footer(
      "Examples:\n"
      "  vmsnap restore vm.img\n"
      "  vmsnap restore --store /backup/vms latest --vm web1\n"
      "  vmsnap restore vm.img --run-dir /run/copy --detach --json\n"
      "  vmsnap restore vm.img --prefetch none --record-working-set\n"
      "  vmsnap restore vm.img --replace /disks/vm.qcow2=/disks/copy.qcow2\n"
      "  vmsnap restore vm.img -- -netdev user,id=net0\n"
      "  vmsnap restore vm.img --clones 30 --run-dir /run/farm --detach\n"
      "  vmsnap restore vm.img --clones 2 --replace /d/vm.qcow2=/d/clone-{clone}.qcow2\n"
      "  vmsnap restore --reattach /run/copy");
  command->callback([arguments, &context] {
    context.run = [arguments, &context] { return run_restore(*arguments, context); };
  });
}

void add_clones(CLI::App& app, CommandContext& context) {
  auto options = std::make_shared<ClonesOptions>();
  CLI::App* command =
      app.add_subcommand("clones", "List, wait for or stop the clones of restore --clones");
  command->add_option("--run-dir", options->run_dir, "The directory that they run in")->required();
  CLI::Option* wait =
      command->add_flag("--wait", options->wait, "Return when they have ended");
  command->add_flag("--stop", options->stop, "End them; their logs stay")->excludes(wait);
  command->add_flag("--remove", options->remove, "End them and delete their directories")
      ->excludes(wait);
  command->add_flag("--json", options->json, "Print one JSON object");
  command->add_option("CLONE", options->names, "Numbers of clones; none: all");
  command->footer(
      "Examples:\n"
      "  vmsnap clones --run-dir /run/farm\n"
      "  vmsnap clones --run-dir /run/farm --stop 3 4\n"
      "  vmsnap clones --run-dir /run/farm --wait");
  command->callback([options, &context] {
    context.run = [options, &context] { return run_clones(*options, context); };
  });
}

void add_serve(CLI::App& app, CommandContext& context) {
  auto options = std::make_shared<ServeOptions>();
  auto prefetch = std::make_shared<std::string>("all");
  CLI::App* command =
      app.add_subcommand("serve", "Serve pages of an image to Firecracker-style VMMs");
  add_image_argument(*command, options->image)->required();
  command->add_option("--socket", options->socket, "Unix socket to listen on")->required();
  add_prefetch_option(*command, *prefetch);
  command->add_flag("--write-protect", options->write_protect,
                    "Pages arrive write-protected, where the VMM registered for that");
  command->add_flag("--once", options->once, "End when the first VMM has gone");
  command->footer(
      "Examples:\n"
      "  vmsnap serve vm.img --socket /run/uffd.sock\n"
      "  vmsnap serve vm.img --socket /run/uffd.sock --once");
  command->callback([options, prefetch, &context] {
    context.run = [options, prefetch, &context]() -> Status {
      options->prefetch = VMSNAP_TRY(parse_prefetch(*prefetch));
      return serve(*options, context);
    };
  });
}

}  // namespace

void add_restore_commands(CLI::App& app, CommandContext& context) {
  add_restore(app, context);
  add_clones(app, context);
  add_serve(app, context);
}

}  // namespace vmsnap
