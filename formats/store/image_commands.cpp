// The commands about image files: show, verify, export.
#include <fmt/format.h>

#include <ctime>
#include <memory>
#include <ostream>
#include <string>

#include "formats/command.h"
#include "formats/export.h"
#include "formats/image_reader.h"
#include "formats/store/image_argument.h"
#include "formats/metadata.h"
#include "formats/verify.h"

namespace vmsnap {

namespace {

using Json = nlohmann::ordered_json;

// Text from elsewhere may hold anything, also what drives a terminal.
std::string printable(const std::string& text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    out += byte < 0x20 || byte == 0x7f ? fmt::format("\\x{:02x}", byte) : std::string(1, c);
  }
  return out;
}

std::string human_bytes(uint64_t bytes) {
  constexpr const char* units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB"};
  if (bytes < 1024) return fmt::format("{} {}", bytes, units[0]);
  auto value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(units)) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.1f} {}", value, units[unit]);
}

// "2024-11-20 22:11:40.123 UTC"
std::string utc_text(int64_t unix_ms) {
  const std::time_t seconds = unix_ms / 1000;
  std::tm utc = {};
  ::gmtime_r(&seconds, &utc);
  return fmt::format("{:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:03} UTC", utc.tm_year + 1900,
                     utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec,
                     unix_ms % 1000);
}

bool mapped(const Region& region) { return region.address != ~uint64_t{0}; }

void print_json(const CommandContext& context, const Json& json) {
  context.out << json.dump(2, ' ', false, Json::error_handler_t::replace) << '\n';
}

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
    const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
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
    print_json(context, show_json(*image));
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
  bool json = false;
};

Status verify(CommandContext& context, const VerifyOptions& options) {
  VerifyProgress progress;
  if (context.terminal) {
    progress = [&context](int percent) {
      context.err << fmt::format("\r{:3} %{}", percent, percent == 100 ? "\r     \r" : "")
                  << std::flush;
    };
  }
  const VerifyReport report = VMSNAP_TRY(verify_image(options.image.name, progress));
  if (options.json) {
    print_json(context, verify_json(report));
  } else {
    verify_text(report, context.out);
  }
  return report.status();
}

void add_verify(CLI::App& app, CommandContext& context) {
  const auto options = std::make_shared<VerifyOptions>();
  CLI::App* command = app.add_subcommand("verify", "Check every byte of an image");
  add_image_argument(*command, options->image)->required();
  command->add_flag("--json", options->json, "Print one JSON object");
  command->footer(
      "Exits with status 9 if anything is damaged, and names every page that is lost.\n"
      "Examples:\n"
      "  vmsnap verify vm.img\n"
      "  vmsnap verify --json vm.img | jq '.damaged[]'");
  command->callback([&context, options] {
    context.run = [&context, options] { return verify(context, *options); };
  });
}

// ---- export

struct ExportOptions {
  ImageArgument image;
  std::string raw;
  bool force = false;
};

Status export_image(CommandContext& context, const ExportOptions& options) {
  const auto image = VMSNAP_TRY(open_image(options.image));
  if (options.raw == "-") return export_raw(*image, context.out);
  const uint64_t written = VMSNAP_TRY(export_raw(*image, options.raw, options.force));
  context.out << fmt::format("{}: {}, of which {} are not holes\n", printable(options.raw),
                             human_bytes(image->page_count() * page_size), human_bytes(written));
  return {};
}

void add_export(CLI::App& app, CommandContext& context) {
  const auto options = std::make_shared<ExportOptions>();
  CLI::App* command = app.add_subcommand("export", "Write an image's memory as plain bytes");
  add_image_argument(*command, options->image)->required();
  command
      ->add_option("--raw", options->raw,
                   "Where to: all regions one after the other, as 'show' lists them; "
                   "'-' is standard output")
      ->required();
  command->add_flag("-f,--force", options->force, "Replace the output file if it exists");
  command->footer(
      "Examples:\n"
      "  vmsnap export vm.img --raw vm.raw\n"
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
