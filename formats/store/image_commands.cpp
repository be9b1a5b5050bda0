// The commands about image files: show, verify, export.
#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <unistd.h>

#include <charconv>
#include <memory>
#include <ostream>
#include <string>

#include "formats/command.h"
#include "formats/export.h"
#include "formats/image_reader.h"
#include "formats/json.h"
#include "formats/store/copy_image.h"
#include "formats/store/image_argument.h"
#include "formats/store/manifest.h"
#include "formats/store/store_verify.h"
#include "formats/text.h"
#include "formats/verify.h"

namespace vmsnap {

namespace {

using Json = nlohmann::ordered_json;

bool mapped(const Region& region) { return region.address != ~uint64_t{0}; }

// ---- show

Json show_json(const ImageReader& image) {
  const ImageInfo& info = image.info();
  const ImageSummary& summary = image.summary();
  Json regions = Json::array();
  for (const Region& region : info.regions) {
    regions.push_back({{"name", region.name},
                       {"address", mapped(region) ? Json(region.address) : Json()},
                       {"length", region.length},
                       {"raw_offset", region.first_page * page_size}});
  }
  return {{"id", info.id},
          {"file", image.path()},
          {"version", summary.format_version},
          {"created_unix_ms", info.created_unix_ms},
          {"regions", std::move(regions)},
          {"pages",
           {{"total", summary.page_count},
            {"zero", summary.zero_pages},
            {"duplicate", summary.duplicate_pages},
            {"stored", summary.stored_pages}}},
          {"bytes", {{"guest", summary.page_count * page_size}, {"image", summary.file_bytes}}},
          {"device_state_bytes", summary.device_state_bytes},
          {"source", info.source}};
}

void show_text(const ImageReader& image, std::ostream& out) {
  const ImageInfo& info = image.info();
  const ImageSummary& summary = image.summary();
  const uint64_t guest_bytes = summary.page_count * page_size;
  out << fmt::format("image         {}\n", printable(image.path()));
  out << fmt::format("id            {}\n", info.id);
  out << fmt::format("format        version {}\n", summary.format_version);
  out << fmt::format("taken         {}\n", utc_text(info.created_unix_ms));
  out << fmt::format("memory        {} in {} region{}\n", human_bytes(guest_bytes),
                     info.regions.size(), info.regions.size() == 1 ? "" : "s");
  out << fmt::format("file          {}\n", human_bytes(summary.file_bytes));
  out << fmt::format("pages         {} = {} zero + {} duplicate + {} stored\n", summary.page_count,
                     summary.zero_pages, summary.duplicate_pages, summary.stored_pages);
  out << fmt::format("device state  {}\n", human_bytes(summary.device_state_bytes));
  for (const auto& [key, value] : info.source.items()) {
    const std::string text = value.is_string() ? value.get<std::string>() : json_line(value);
    out << fmt::format("source        {}: {}\n", printable(key), printable(text));
  }
  out << fmt::format("\n{:>18} {:>12} {:>18}  {}\n", "address", "length", "raw offset", "region");
  for (const Region& region : info.regions) {
    out << fmt::format("{:>18} {:>12} {:>18}  {}\n",
                       mapped(region) ? fmt::format("{:#x}", region.address) : "-",
                       human_bytes(region.length),
                       fmt::format("{:#x}", region.first_page * page_size), region.name);
  }
}

struct ShowOptions {
  ImageArgument image;
  bool json = false;
};

Status show(CommandContext& context, const ShowOptions& options) {
  const auto image = VMSNAP_TRY(open_image(options.image));
  if (options.json) {
    print_json(context.out, show_json(*image));
  } else {
    show_text(*image, context.out);
  }
  return {};
}

void add_show(CLI::App& app, CommandContext& context) {
  const auto options = std::make_shared<ShowOptions>();
  CLI::App* command = app.add_subcommand("show", "Say what an image holds");
  add_image_argument(*command, options->image)->required();
  command->add_flag("--json", options->json, "Print one JSON object");
  command->footer(
      "Examples:\n"
      "  vmsnap show vm.img\n"
      "  vmsnap show --json vm.img | jq .pages");
  command->callback([&context, options] {
    context.run = [&context, options] { return show(context, *options); };
  });
}

// ---- verify

Json verify_json(const VerifyReport& report) {
  Json damaged = Json::array();
  for (const DamagedRange& range : report.damaged) {
    damaged.push_back({{"region", range.region},
                       {"offset", range.offset},
                       {"length", range.page_count * page_size},
                       {"reason", range.reason}});
  }
  return {{"file", report.path},
          {"ok", report.ok()},
          {"pages",
           {{"total", report.page_count},
            {"data", report.data_pages},
            {"zero", report.zero_pages},
            {"damaged", report.damaged_pages}}},
          {"damaged", std::move(damaged)},
          {"other_damage", report.other_damage}};
}

void verify_text(const VerifyReport& report, std::ostream& out) {
  for (const DamagedRange& range : report.damaged) {
    out << fmt::format("lost: region {} offset {:#x} length {:#x}: {}\n", range.region,
                       range.offset, range.page_count * page_size, printable(range.reason));
  }
  for (const std::string& other : report.other_damage) out << printable(other) << '\n';
  if (report.ok()) {
    out << fmt::format("{} is whole: {} pages with data, {} zero pages\n", printable(report.path),
                       report.data_pages, report.zero_pages);
  }
}

struct VerifyOptions {
  ImageArgument image;
  std::string sample = "100%";
  bool resume = false;
  bool json = false;
};

VerifyProgress percent_on_terminal(CommandContext& context) {
  if (!context.terminal) return {};
  return [&context](int percent) {
    context.err << fmt::format("\r{:3} %{}", percent, percent == 100 ? "\r     \r" : "")
                << std::flush;
  };
}

Result<double> parse_share(const std::string& text) {
  double percent = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), percent);
  const std::string_view rest(parsed.ptr, text.data() + text.size() - parsed.ptr);
  if (parsed.ec != std::errc() || (rest != "" && rest != "%") || !(percent > 0 && percent <= 100)) {
    return fail(ErrorCode::usage, "--sample wants a share of 100, such as 5%, not '{}'", text);
  }
  return percent / 100;
}

Json store_verify_json(const StoreVerifyReport& report) {
  Json packs = Json::array(), missing = Json::array(), manifests = Json::array(),
       snapshots = Json::array();
  for (const PackCheck& pack : report.damaged_packs) {
    packs.push_back({{"id", id_text(pack.id)}, {"path", pack.path}, {"reasons", pack.reasons}});
  }
  for (const layout::ImageId& id : report.missing_packs) missing.push_back(id_text(id));
  for (const auto& manifest : report.unreadable) {
    manifests.push_back({{"id", manifest.id}, {"reason", manifest.reason}});
  }
  for (const auto& snapshot : report.damaged_snapshots) {
    Json json = verify_json(snapshot.report);
    json["id"] = snapshot.id;
    json["vm"] = snapshot.vm;
    json["created_unix_ms"] = snapshot.created_unix_ms;
    snapshots.push_back(std::move(json));
  }
  return {{"ok", report.ok()},
          {"snapshots", report.snapshots},
          {"packs",
           {{"total", report.packs}, {"checked", report.packs_checked}, {"resumed", report.packs_resumed}}},
          {"bytes_checked", report.bytes_checked},
          {"damaged_packs", std::move(packs)},
          {"missing_packs", std::move(missing)},
          {"unreadable_snapshots", std::move(manifests)},
          {"damaged_snapshots", std::move(snapshots)}};
}

void store_verify_text(const StoreVerifyReport& report, std::ostream& out) {
  for (const PackCheck& pack : report.damaged_packs) {
    for (const std::string& reason : pack.reasons) out << printable(reason) << '\n';
  }
  for (const layout::ImageId& id : report.missing_packs) {
    out << fmt::format("pack {} is missing\n", id_text(id));
  }
  for (const auto& manifest : report.unreadable) out << printable(manifest.reason) << '\n';
  for (const auto& snapshot : report.damaged_snapshots) {
    out << fmt::format("snapshot {} of {}, {}:\n", snapshot.id, printable(snapshot.vm),
                       utc_text(snapshot.created_unix_ms));
    verify_text(snapshot.report, out);
  }
  out << fmt::format("{}: {} snapshots, {} of {} packs ({}) checked{}, {}\n",
                     printable(report.store), report.snapshots, report.packs_checked, report.packs,
                     human_bytes(report.bytes_checked),
                     report.packs_resumed == 0
                         ? ""
                         : fmt::format(" and {} before", report.packs_resumed),
                     report.ok() ? "all whole" : "damage found");
}

Status verify_in_store(CommandContext& context, const VerifyOptions& options) {
  const auto store = VMSNAP_TRY(Store::open(options.image.store.options()));
  StoreVerifyOptions wanted = {.snapshots = {},
                               .sample = VMSNAP_TRY(parse_share(options.sample)),
                               .resume = options.resume};
  if (!options.image.name.empty()) {
    wanted.snapshots.push_back(VMSNAP_TRY(
        resolve_snapshot(*store, Where::snapshots, options.image.name, options.image.vm)));
  }
  const VerifyProgress percent = percent_on_terminal(context);
  const StoreVerifyReport report =
      VMSNAP_TRY(verify_store(*store, wanted, [&](const StoreVerifyProgress& progress) {
        if (percent && progress.bytes != 0) {
          percent(static_cast<int>(100 * progress.bytes_done / progress.bytes));
        }
      }));
  if (options.json) {
    print_json(context.out, store_verify_json(report));
  } else {
    store_verify_text(report, context.out);
  }
  return report.status();
}

Status verify(CommandContext& context, const VerifyOptions& options) {
  if (!options.image.store.directory.empty()) return verify_in_store(context, options);
  if (options.image.name.empty()) {
    return fail(ErrorCode::usage, "verify wants an image, or --store DIR");
  }
  const VerifyReport report =
      VMSNAP_TRY(verify_image(options.image.name, percent_on_terminal(context)));
  if (options.json) {
    print_json(context.out, verify_json(report));
  } else {
    verify_text(report, context.out);
  }
  return report.status();
}

void add_verify(CLI::App& app, CommandContext& context) {
  const auto options = std::make_shared<VerifyOptions>();
  CLI::App* command = app.add_subcommand("verify", "Check every byte of an image or a store");
  add_image_argument(*command, options->image);
  command
      ->add_option("--sample", options->sample,
                   "Share of a store's packs to check; those not checked for longest come first")
      ->type_name("PERCENT");
  command->add_flag("--resume", options->resume,
                    "Go on where a verify of the whole store was ended");
  command->add_flag("--json", options->json, "Print one JSON object");
  command->footer(
      "Exits with status 9 if anything is damaged, and names every page that is lost.\n"
      "Examples:\n"
      "  vmsnap verify vm.img\n"
      "  vmsnap verify --store /backup/vms --sample 5%\n"
      "  vmsnap verify --json vm.img | jq '.damaged[]'");
  command->callback([&context, options] {
    context.run = [&context, options] { return verify(context, *options); };
  });
}

// ---- export

struct ExportOptions {
  ImageArgument image;
  std::string raw;
  std::string to_image;
  bool force = false;
  bool deltas = false;
};

Status export_image(CommandContext& context, const ExportOptions& options) {
  if (options.raw.empty() == options.to_image.empty()) {
    return fail(ErrorCode::usage, "export wants one of --raw and --image");
  }
  const auto image = VMSNAP_TRY(open_image(options.image));
  if (options.to_image == "-") return copy_image_to_pipe(*image, STDOUT_FILENO, options.deltas);
  if (!options.to_image.empty()) {
    const uint64_t bytes = VMSNAP_TRY(
        copy_image(*image, options.to_image, options.force, options.deltas));
    context.out << fmt::format("{}: {} of memory in {}\n", printable(options.to_image),
                               human_bytes(image->page_count() * page_size), human_bytes(bytes));
    return {};
  }
  if (options.raw == "-") return export_raw(*image, context.out);
  const uint64_t written = VMSNAP_TRY(export_raw(*image, options.raw, options.force));
  context.out << fmt::format("{}: {}, of which {} are not holes\n", printable(options.raw),
                             human_bytes(image->page_count() * page_size), human_bytes(written));
  return {};
}

void add_export(CLI::App& app, CommandContext& context) {
  const auto options = std::make_shared<ExportOptions>();
  CLI::App* command = app.add_subcommand("export", "Write an image's memory as plain bytes, or as an image file");
  add_image_argument(*command, options->image)->required();
  command
      ->add_option("--raw", options->raw,
                   "Where to: all regions one after the other, as 'show' lists them; "
                   "'-' is standard output");
  auto* to_image =
      command->add_option("--image", options->to_image,
                          "Where to, as an image file that needs no store; '-' is standard output");
  add_delta_option(*command, options->deltas)->needs(to_image);
  command->add_flag("-f,--force", options->force, "Replace the output file if it exists");
  command->footer(
      "Examples:\n"
      "  vmsnap export vm.img --raw vm.raw\n"
      "  vmsnap export --store /backup/vms latest --image - | ssh host vmsnap import --store S -\n"
      "  vmsnap export vm.img --raw - | strings -n 12 | less");
  command->callback([&context, options] {
    context.run = [&context, options] { return export_image(context, *options); };
  });
}

}  // namespace

void add_image_commands(CLI::App& app, CommandContext& context) {
  add_show(app, context);
  add_verify(app, context);
  add_export(app, context);
}

}  // namespace vmsnap
