#include "snap/backup.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <ostream>

#include "formats/clock.h"
#include "formats/json.h"
#include "formats/log.h"
#include "formats/processors.h"
#include "formats/store/manifest.h"
#include "formats/store/prune.h"
#include "formats/store/store_verify.h"
#include "snap/snapshot.h"

namespace vmsnap {

namespace {

using Event = nlohmann::ordered_json;

StoreOptions store_options(const BackupConfig& config) {
  StoreOptions options = {.directory = config.store, .key = {}};
  if (!config.key_file.empty()) options.key.key_file = config.key_file;
  if (!config.passphrase_file.empty()) options.key.passphrase_file = config.passphrase_file;
  if (!config.passphrase_command.empty()) options.key.passphrase_command = config.passphrase_command;
  return options;
}

class BackupRun {
 public:
  BackupRun(const BackupConfig& config, CommandContext& context)
      : config_(config), context_(context) {}

  Status all();
  Status ages();

 private:
  Status snapshot(const BackupVm& vm);
  Status prune_store();
  Status verify_sample();
  Status check_ages();
  void print(const Event& event) {
    context_.out << json_line(event) << std::endl;
  }
  // Notes it, and goes on; but not after a signal.
  // `of`: what it was about, before the message; may be empty.
  Status note(const Status& status, const std::string& of = {});
  Status steps();  // an error is that of an interruption
  Status end(Status worst = {});

  const BackupConfig& config_;
  CommandContext& context_;
  std::vector<std::string> failed_;
  std::vector<Error> errors_;
};

Status BackupRun::note(const Status& status, const std::string& of) {
  if (status) return {};
  if (status.error().code() == ErrorCode::interrupted) return status;
  log_warning("{}{}", of, status.error().message());
  if (!status.error().remedy().empty()) log_warning("  {}", status.error().remedy());
  errors_.push_back(status.error());
  return {};
}

Status BackupRun::snapshot(const BackupVm& vm) {
  SnapshotOptions options;
  options.store = store_options(config_);
  options.dedup_domain = vm.dedup_domain;
  options.tags = vm.tags;
  // By which a later run finds the snapshots of a VM that does not answer, and
  // prune those of a VM whose QEMU has no name, or that of another.
  options.tags.push_back(backup_tag(vm.name));
  options.without_disks = vm.without_disks;
  options.pause_command = vm.pause_command;
  options.pause_command_limit = vm.pause_command_limit;
  options.stall_limit = vm.stall_limit;
  options.copy_pinned = vm.copy_pinned;
  options.cpus = config_.cpus ? static_cast<unsigned>(*config_.cpus) : default_threads();
  options.memory = config_.memory;
  options.bytes_per_second = config_.bandwidth.value_or(0);
  options.level = config_.level;
  options.deltas = config_.delta;
  const auto summary = snapshot_vm(vm.monitor, options, [](SnapshotPhase, const CaptureCounters*) {});
  if (summary) {
    print({{"event", "snapshot"},
           {"vm", vm.name},
           {"ok", true},
           {"id", summary->id},
           {"pause_ms", summary->pause_ms},
           {"total_ms", summary->total_ms},
           {"bytes_added", summary->image_bytes}});
    return {};
  }
  print({{"event", "snapshot"},
         {"vm", vm.name},
         {"ok", false},
         {"status", exit_status(summary.error().code())},
         {"error", summary.error().message()},
         {"remedy", summary.error().remedy()}});
  failed_.push_back(vm.name);
  return tl::unexpected(summary.error());
}

Status BackupRun::prune_store() {
  const auto store = VMSNAP_TRY(Store::open(store_options(config_)));
  PruneOptions options;
  options.keep = config_.keep;
  // Not what another configuration took into the same store, nor what was taken by hand.
  options.backup_names.emplace();
  for (const BackupVm& vm : config_.vms) options.backup_names->insert(vm.name);
  options.lock_wait = config_.lock_wait;
  options.now_unix_ms = now_unix_ms();
  const PruneReport report = VMSNAP_TRY(prune(*store, options));
  print({{"event", "prune"},
         {"removed", report.removed},
         {"kept", report.kept},
         {"freed_bytes", report.freed_bytes}});
  return {};
}

Status BackupRun::verify_sample() {
  const auto store = VMSNAP_TRY(Store::open(store_options(config_)));
  const StoreVerifyReport report = VMSNAP_TRY(
      verify_store(*store, {.snapshots = {}, .sample = config_.sample, .resume = false}));
  print({{"event", "verify"},
         {"packs", report.packs_checked},
         {"bytes", report.bytes_checked},
         {"damaged", report.damaged_packs.size() + report.missing_packs.size()},
         {"unreadable_snapshots", report.unreadable.size()}});
  return report.status();
}

Status BackupRun::check_ages() {
  const auto limited = [](const BackupVm& vm) { return vm.max_age.has_value(); };
  if (std::ranges::none_of(config_.vms, limited)) return {};
  const auto store = VMSNAP_TRY(Store::open(store_options(config_)));
  const SnapshotList list = VMSNAP_TRY(list_snapshots(*store, Where::snapshots));
  const int64_t now = now_unix_ms();
  std::vector<std::string> stale;
  for (const BackupVm& vm : config_.vms) {
    if (!vm.max_age) continue;
    const bool fresh = std::ranges::any_of(list.snapshots, [&](const SnapshotEntry& entry) {
      return is_fresh(entry.info.created_unix_ms, now, *vm.max_age) &&
             backup_name(entry.info.tags) == vm.name;
    });
    if (fresh) continue;
    print({{"event", "stale"}, {"vm", vm.name}});
    stale.push_back(vm.name);
  }
  if (stale.empty()) return {};
  return fail(ErrorCode::stale, "{} of {} VMs have no snapshot as new as it must be, first {}",
              stale.size(), config_.vms.size(), stale.front());
}

// The worst of what was noted, unless the run was interrupted; and the last line.
Status BackupRun::end(Status worst) {
  for (const ErrorCode code : {ErrorCode::locked, ErrorCode::damaged, ErrorCode::no_space}) {
    const auto found = std::ranges::find(errors_, code, &Error::code);
    if (worst && found != errors_.end()) worst = tl::unexpected(*found);
  }
  if (worst && !failed_.empty()) {
    worst = fail(ErrorCode::some_failed, "{} of {} VMs could not be snapshotted, first {}",
                 failed_.size(), config_.vms.size(), failed_.front());
  }
  if (worst && !errors_.empty()) worst = tl::unexpected(errors_.front());
  print({{"event", "end"},
         {"status", worst ? 0 : exit_status(worst.error().code())},
         {"failed", failed_}});
  return worst;
}

Status BackupRun::all() {
  const Status interrupted = steps();
  return interrupted ? end() : end(interrupted);
}

Status BackupRun::steps() {
  for (const BackupVm& vm : config_.vms) {
    VMSNAP_CHECK(note(snapshot(vm), fmt::format("VM '{}' ({}): ", vm.name, vm.monitor.place())));
  }
  if (config_.keep) VMSNAP_CHECK(note(prune_store()));
  if (config_.sample > 0) VMSNAP_CHECK(note(verify_sample()));
  return note(check_ages());
}

Status BackupRun::ages() {
  VMSNAP_CHECK(note(check_ages()));
  return end();
}

struct BackupArguments {
  std::string config;
  bool check = false;
};

}  // namespace

Status run_backup(const BackupConfig& config, CommandContext& context) {
  return BackupRun(config, context).all();
}

Status check_backup_ages(const BackupConfig& config, CommandContext& context) {
  return BackupRun(config, context).ages();
}

void add_backup_command(CLI::App& app, CommandContext& context) {
  const auto arguments = std::make_shared<BackupArguments>();
  CLI::App* command = app.add_subcommand("backup", "Snapshot a list of VMs into a store, for cron");
  command->add_option("--config", arguments->config, "What to do: see vmsnap-backup(5)")
      ->type_name("FILE")
      ->required();
  command->add_flag("--check", arguments->check,
                    "Only look whether every VM has a snapshot as new as its max-age");
  command->footer(
      "Prints one JSON object a line. Exits with 15 if some VM failed, 9 if the store is\n"
      "damaged, 14 if it is locked, 7 without space, 13 if a snapshot is too old.\n"
      "Examples:\n"
      "  vmsnap backup --config /etc/vmsnap/backup.toml\n"
      "  vmsnap backup --config /etc/vmsnap/backup.toml --check");
  command->callback([&context, arguments] {
    context.run = [&context, arguments]() -> Status {
      const BackupConfig config = VMSNAP_TRY(read_backup_config(arguments->config));
      return arguments->check ? check_backup_ages(config, context) : run_backup(config, context);
    };
  });
}

}  // namespace vmsnap
