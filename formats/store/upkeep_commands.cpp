// The commands that keep a store in order: prune and repair.
#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>
#include <ostream>

#include "formats/clock.h"
#include "formats/command.h"
#include "formats/json.h"
#include "formats/retention.h"
#include "formats/store/image_argument.h"
#include "formats/store/prune.h"
#include "formats/store/store_commands.h"
#include "formats/store/store_repair.h"
#include "formats/text.h"

namespace vmsnap {

namespace {

using OrderedJson = nlohmann::ordered_json;

// ---- prune

struct PruneArguments {
  StoreArgument store;
  KeepRule keep;
  PruneOptions options;
  std::string lock_wait;  // empty: not at all
  double repack_below = 50;  // percent
  bool json = false;
};

OrderedJson prune_json(const PruneReport& report) {
  OrderedJson decisions = OrderedJson::array();
  for (const auto& [snapshot, decision] : report.decisions) {
    decisions.push_back({{"id", snapshot.id},
                         {"vm", snapshot.vm()},
                         {"group", snapshot.group()},
                         {"created_unix_ms", snapshot.info.created_unix_ms},
                         {"keep", decision.keep},
                         {"reasons", decision.reasons}});
  }
  return {{"kept", report.kept},
          {"removed", report.removed},
          {"deleted", report.deleted},
          {"in_use", report.in_use},
          {"packs_deleted", report.packs_deleted},
          {"freed_bytes", report.freed_bytes},
          {"packs_waiting", report.packs_waiting},
          {"waiting_bytes", report.waiting_bytes},
          {"packs_repacked", report.repacked.packs},
          {"repacked_bytes", report.repacked.bytes},
          {"repacked_needed_bytes", report.repacked.needed_bytes},
          {"decisions", std::move(decisions)}};
}

void prune_text(const PruneReport& report, const PruneOptions& options, std::ostream& out) {
  for (const auto& [snapshot, decision] : report.decisions) {
    out << fmt::format("{} {} {} {}{}\n", decision.keep ? "keep  " : "remove",
                       snapshot.id.substr(0, 12), utc_text(snapshot.info.created_unix_ms),
                       printable(snapshot.group()),
                       decision.keep ? fmt::format(": {}", fmt::join(decision.reasons, ", ")) : "");
  }
  if (options.dry_run) {
    out << fmt::format("{} would be kept, {} removed\n", report.kept, report.removed);
    if (report.repacked.packs != 0) {
      out << fmt::format("{} packs of {} would be repacked: {} of them are needed\n",
                         report.repacked.packs, human_bytes(report.repacked.bytes),
                         human_bytes(report.repacked.needed_bytes));
    }
    return;
  }
  out << fmt::format("{} kept, {} put into the trash, {} deleted from it, {} freed\n", report.kept,
                     report.removed, report.deleted, human_bytes(report.freed_bytes));
  if (report.removed != 0 && !options.empty_trash) {
    out << "What is in the trash is deleted by the next prune.\n";
  }
  if (report.repacked.packs != 0) {
    out << fmt::format("{} packs of {} repacked: {} of them were needed\n", report.repacked.packs,
                       human_bytes(report.repacked.bytes), human_bytes(report.repacked.needed_bytes));
  }
  if (report.packs_waiting != 0) {
    out << fmt::format("{} more are freed by the next prune: somebody may be reading them\n",
                       human_bytes(report.waiting_bytes));
  }
}

Status run_prune(CommandContext& context, PruneArguments& arguments) {
  PruneOptions options = arguments.options;
  if (check_keep_rule(arguments.keep)) options.keep = arguments.keep;
  if (!options.keep && !options.vm.empty()) {
    return fail(ErrorCode::usage, "--vm says for which VM to keep what: give a --keep- option, too");
  }
  options.lock_wait = VMSNAP_TRY(parse_lock_wait(arguments.lock_wait));
  options.repack_below = arguments.repack_below / 100;
  options.now_unix_ms = now_unix_ms();
  const auto store = VMSNAP_TRY(Store::open(arguments.store.options()));
  const PruneReport report = VMSNAP_TRY(prune(*store, options));
  if (arguments.json) {
    print_json(context.out, prune_json(report));
  } else {
    prune_text(report, options, context.out);
  }
  return {};
}

void add_prune(CLI::App& app, CommandContext& context) {
  const auto arguments = std::make_shared<PruneArguments>();
  CLI::App* command =
      app.add_subcommand("prune", "Remove old snapshots by rules, and free what nobody needs");
  add_store_option(*command, arguments->store)->required();
  add_keep_options(*command, arguments->keep);
  command->add_option("--vm", arguments->options.vm, "Only snapshots of the VM with this name, or that backup calls so")
      ->type_name("NAME");
  command->add_flag("-n,--dry-run", arguments->options.dry_run,
                    "Say what would be kept and why, and do nothing");
  command->add_flag("--empty-trash", arguments->options.empty_trash,
                    "Also delete for good what this run removes");
  command->add_option("--repack-below", arguments->repack_below,
                      "Rewrite packs of which less than this much is needed (default 50)")
      ->type_name("PERCENT")
      ->check(CLI::Range(0.0, 100.0));
  add_lock_wait_option(*command, arguments->lock_wait);
  command->add_flag("--json", arguments->json, "Print one JSON object");
  command->footer(
      "Without a rule of what to keep, no snapshot is removed; the trash is emptied.\n"
      "Examples:\n"
      "  vmsnap prune --store /backup/vms --keep-daily 7 --keep-weekly 4 --dry-run\n"
      "  vmsnap prune --store /backup/vms --keep-last 3 --vm web1");
  command->callback([&context, arguments] {
    context.run = [&context, arguments] { return run_prune(context, *arguments); };
  });
}

// ---- repair

struct RepairOptions {
  StoreArgument store;
  std::string lock_wait;  // empty: not at all
};

Status repair(CommandContext& context, const RepairOptions& options) {
  const auto wait = VMSNAP_TRY(parse_lock_wait(options.lock_wait));
  const auto store = VMSNAP_TRY(Store::open(options.store.options()));
  const StoreRepairReport report = VMSNAP_TRY(repair_store(*store, {.lock_wait = wait}));
  for (const std::string& sentence : report.sentences) context.out << printable(sentence) << '\n';
  return {};
}

void add_repair(CLI::App& app, CommandContext& context) {
  const auto options = std::make_shared<RepairOptions>();
  CLI::App* command = app.add_subcommand(
      "repair", "Put what is damaged in a store into quarantine, and make its indexes anew");
  add_store_option(*command, options->store)->required();
  add_lock_wait_option(*command, options->lock_wait);
  command->footer("Examples:\n  vmsnap repair --store /backup/vms");
  command->callback([&context, options] {
    context.run = [&context, options] { return repair(context, *options); };
  });
}

}  // namespace

void add_upkeep_commands(CLI::App& app, CommandContext& context) {
  add_prune(app, context);
  add_repair(app, context);
}

}  // namespace vmsnap
