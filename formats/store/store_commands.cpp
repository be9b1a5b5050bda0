// The commands about what is in a store: list, import, rm, undelete, diff.
#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <memory>
#include <ostream>

#include "formats/clock.h"
#include "formats/command.h"
#include "formats/duration.h"
#include "formats/json.h"
#include "formats/metadata.h"
#include "formats/store/copy_image.h"
#include "formats/store/image_argument.h"
#include "formats/store/manifest.h"
#include "formats/store/prune.h"
#include "formats/store/store_commands.h"
#include "formats/store/store_diff.h"
#include "formats/text.h"

namespace vmsnap {

namespace {

using OrderedJson = nlohmann::ordered_json;

// ---- list

struct ListOptions {
  StoreArgument store;
  std::string vm, tag, max_age;
  bool trash = false, quiet = false, json = false;
};

OrderedJson entry_json(const SnapshotEntry& entry) {
  return {{"id", entry.id},
          {"vm", entry.vm()},
          {"created_unix_ms", entry.info.created_unix_ms},
          {"tags", entry.info.tags},
          {"domain", entry.info.domain},
          {"bytes",
           {{"guest", entry.page_count * page_size},
            {"used", (entry.page_count - entry.zero_pages) * page_size},
            {"added", entry.info.added_bytes + entry.manifest_bytes}}}};
}

bool has_tag(const SnapshotEntry& entry, const std::string& tag) {
  return tag.empty() || std::ranges::find(entry.info.tags, tag) != entry.info.tags.end();
}

Status check_age(const std::vector<SnapshotEntry>& found, const ListOptions& options) {
  if (options.max_age.empty()) return {};
  const std::chrono::milliseconds limit = VMSNAP_TRY(parse_clock_duration(options.max_age));
  const std::string whose = options.vm.empty() ? "" : " of " + options.vm;
  if (found.empty()) {
    return fail(ErrorCode::stale, "{} has no snapshot{}", options.store.directory, whose);
  }
  const int64_t now = now_unix_ms();
  const SnapshotEntry* newest = nullptr;  // of those that are not dated ahead
  for (const SnapshotEntry& entry : found) {
    if (is_fresh(entry.info.created_unix_ms, now, limit)) return {};
    if (entry.info.created_unix_ms <= now) newest = &entry;
  }
  if (!newest) {
    return tl::unexpected(
        Error(ErrorCode::stale, fmt::format("every snapshot{} in {} has a date in the future", whose,
                                            options.store.directory))
            .with_remedy("Set the clock of this host right, and take a new one."));
  }
  return fail(ErrorCode::stale, "the newest snapshot{} in {} is {:.1f} hours old", whose,
              options.store.directory,
              static_cast<double>(now - newest->info.created_unix_ms) / 3'600'000);
}

Status list(CommandContext& context, const ListOptions& options) {
  const auto store = VMSNAP_TRY(Store::open(options.store.options()));
  SnapshotList all =
      VMSNAP_TRY(list_snapshots(*store, options.trash ? Where::trash : Where::snapshots));
  std::erase_if(all.snapshots, [&](const SnapshotEntry& entry) {
    return (!options.vm.empty() && !entry.is_of(options.vm)) || !has_tag(entry, options.tag);
  });
  if (options.json) {
    OrderedJson array = OrderedJson::array();
    for (const SnapshotEntry& entry : all.snapshots) array.push_back(entry_json(entry));
    print_json(context.out, array);
  } else if (options.quiet) {
    for (const SnapshotEntry& entry : all.snapshots) context.out << entry.id << '\n';
  } else {
    context.out << fmt::format("{:12}  {:27}  {:>10}  {:>10}  {:16}  {}\n", "id", "taken", "memory",
                               "added", "vm", "tags");
    for (const SnapshotEntry& entry : all.snapshots) {
      context.out << fmt::format(
          "{:12}  {:27}  {:>10}  {:>10}  {:16}  {}\n", entry.id.substr(0, 12),
          utc_text(entry.info.created_unix_ms),
          human_bytes((entry.page_count - entry.zero_pages) * page_size),
          human_bytes(entry.info.added_bytes + entry.manifest_bytes), printable(entry.vm()),
          fmt::join(entry.info.tags, ","));
    }
  }
  if (!all.unreadable.empty()) return tl::unexpected(all.unreadable.front());
  return check_age(all.snapshots, options);
}

void add_list(CLI::App& app, CommandContext& context) {
  const auto options = std::make_shared<ListOptions>();
  CLI::App* command = app.add_subcommand("list", "List the snapshots in a store");
  add_store_option(*command, options->store)->required();
  command->add_option("--vm", options->vm, "Only of the VM with this name, or that backup calls so")->type_name("NAME");
  command->add_option("--tag", options->tag, "Only with this tag")->type_name("TAG");
  command->add_option("--max-age", options->max_age,
                      "Exit with status 13 if the newest one listed is older, such as 26h")
      ->type_name("AGE");
  command->add_flag("--trash", options->trash, "Those that were removed and not yet pruned");
  command->add_flag("-q,--quiet", options->quiet, "Only ids");
  command->add_flag("--json", options->json, "Print one JSON array");
  command->footer(
      "Examples:\n"
      "  vmsnap list --store /backup/vms\n"
      "  vmsnap list --store /backup/vms --vm web1 --max-age 26h --quiet");
  command->callback([&context, options] {
    context.run = [&context, options] { return list(context, *options); };
  });
}

// ---- import

struct ImportOptions {
  std::string file;
  StoreArgument store;
  std::string domain;
  std::vector<std::string> tags;
  bool deltas = false;
};

Status import_into_store(CommandContext& context, const ImportOptions& options) {
  // Before a store is made, and standard input read.
  VMSNAP_CHECK(check_tags(options.tags, options.domain));
  const auto store = VMSNAP_TRY(Store::open_or_create(options.store.options()));
  const auto image = VMSNAP_TRY(options.file == "-" ? open_spooled(STDIN_FILENO, *store)
                                                    : ImageReader::open(options.file));
  const Imported imported = VMSNAP_TRY(
      import_image(*store, *image, options.domain, options.tags, options.deltas));
  context.out << fmt::format("{} imported, {} added\n", imported.id,
                             human_bytes(imported.added_bytes));
  return {};
}

void add_import(CLI::App& app, CommandContext& context) {
  const auto options = std::make_shared<ImportOptions>();
  CLI::App* command = app.add_subcommand("import", "Put an image file into a store");
  command->add_option("FILE", options->file, "The image; '-' is standard input")->required();
  add_store_option(*command, options->store)->required();
  command->add_option("--tag", options->tags, "Word to find it by (repeatable)")
      ->type_name("TAG")
      ->allow_extra_args(false);
  command->add_option("--dedup-domain", options->domain,
                      "Share pages only with snapshots of the same domain")
      ->type_name("NAME");
  add_delta_option(*command, options->deltas);
  command->footer(
      "Examples:\n"
      "  vmsnap import vm.img --store /backup/vms --tag imported");
  command->callback([&context, options] {
    context.run = [&context, options] { return import_into_store(context, *options); };
  });
}

// ---- rm, undelete

struct NamedOptions {
  StoreArgument store;
  std::vector<std::string> names;
};

Status move_snapshots(CommandContext& context, const NamedOptions& options, Where from) {
  const auto store = VMSNAP_TRY(Store::open(options.store.options()));
  // All of them are looked up before any is touched.
  std::vector<std::string> ids;
  for (const std::string& name : options.names) {
    const std::string id = VMSNAP_TRY(resolve_snapshot(*store, from, name));
    // Who names one twice wants it moved, once.
    if (std::ranges::find(ids, id) == ids.end()) ids.push_back(id);
  }
  for (const std::string& id : ids) {
    if (from == Where::snapshots) {
      VMSNAP_CHECK(remove_snapshot(*store, id));
      context.out << fmt::format("{} removed; 'vmsnap undelete' takes it back until 'vmsnap prune'\n",
                                 id);
    } else {
      VMSNAP_CHECK(undelete_snapshot(*store, id));
      context.out << fmt::format("{} is back\n", id);
    }
  }
  return {};
}

void add_move(CLI::App& app, CommandContext& context, const char* name, const char* what,
              Where from) {
  const auto options = std::make_shared<NamedOptions>();
  CLI::App* command = app.add_subcommand(name, what);
  command->add_option("ID", options->names, "The snapshots: ids, or their beginnings")->required();
  add_store_option(*command, options->store)->required();
  command->footer(fmt::format("Examples:\n  vmsnap {} --store /backup/vms 3f2a", name));
  command->callback([&context, options, from] {
    context.run = [&context, options, from] { return move_snapshots(context, *options, from); };
  });
}

// ---- diff

struct DiffOptions {
  StoreArgument store;
  std::string a, b;
  bool json = false;
};

Status diff(CommandContext& context, const DiffOptions& options) {
  const auto store = VMSNAP_TRY(Store::open(options.store.options()));
  const std::string a = VMSNAP_TRY(resolve_snapshot(*store, Where::snapshots, options.a));
  const std::string b = VMSNAP_TRY(resolve_snapshot(*store, Where::snapshots, options.b));
  const SnapshotDiff diff = VMSNAP_TRY(diff_snapshots(*store, a, b));
  if (options.json) {
    OrderedJson regions = OrderedJson::array();
    for (const SnapshotDiff::RegionDiff& region : diff.regions) {
      OrderedJson ranges = OrderedJson::array();
      for (const SnapshotDiff::Range& range : region.differing) {
        ranges.push_back({{"offset", range.offset}, {"length", range.length}});
      }
      regions.push_back({{"name", region.name},
                         {"in_a", region.in_a},
                         {"in_b", region.in_b},
                         {"differing_pages", region.differing_pages},
                         {"ranges", std::move(ranges)}});
    }
    print_json(context.out, {{"a", a},
                             {"b", b},
                             {"differing_pages", diff.differing_pages},
                             {"differing_bytes", diff.differing_pages * page_size},
                             {"only_a_pages", diff.only_a_pages},
                             {"only_b_pages", diff.only_b_pages},
                             {"all_listed", diff.all_listed},
                             {"regions", std::move(regions)}});
    return {};
  }
  for (const SnapshotDiff::RegionDiff& region : diff.regions) {
    if (!region.in_a || !region.in_b) {
      context.out << fmt::format("region {} is only in {}\n", printable(region.name),
                                 region.in_a ? a : b);
    }
    for (const SnapshotDiff::Range& range : region.differing) {
      context.out << fmt::format("{} offset {:#x} length {:#x}\n", printable(region.name),
                                 range.offset, range.length);
    }
  }
  if (!diff.all_listed) context.out << "... and more\n";
  context.out << fmt::format("{} pages differ ({})\n", diff.differing_pages,
                             human_bytes(diff.differing_pages * page_size));
  return {};
}

void add_diff(CLI::App& app, CommandContext& context) {
  const auto options = std::make_shared<DiffOptions>();
  CLI::App* command = app.add_subcommand("diff", "Say what changed between two snapshots");
  command->add_option("A", options->a, "A snapshot: its id, the beginning of it, or 'latest'")->required();
  command->add_option("B", options->b, "Another one")->required();
  add_store_option(*command, options->store)->required();
  command->add_flag("--json", options->json, "Print one JSON object");
  command->footer("Examples:\n  vmsnap diff --store /backup/vms 3f2a latest");
  command->callback([&context, options] {
    context.run = [&context, options] { return diff(context, *options); };
  });
}

}  // namespace

void add_store_commands(CLI::App& app, CommandContext& context) {
  add_list(app, context);
  add_import(app, context);
  add_move(app, context, "rm", "Put snapshots of a store into its trash", Where::snapshots);
  add_move(app, context, "undelete", "Take snapshots out of a store's trash", Where::trash);
  add_upkeep_commands(app, context);
  add_diff(app, context);
}

}  // namespace vmsnap
