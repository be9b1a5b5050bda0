#include "snap/snapshot_command.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <memory>
#include <ostream>

#include "formats/json.h"
#include "formats/processors.h"
#include "formats/size.h"
#include "formats/store/image_argument.h"
#include "snap/progress.h"
#include "snap/snapshot.h"

namespace vmsnap {

namespace {

struct Arguments {
  std::string qmp, libvirt, connect;
  pid_t pid = 0;
  std::vector<std::string> ranges;
  std::string disks = "refuse";
  double pause_command_limit_s = 10;
  double stall_limit_s = 10, restore_wait_s = 300;
  std::string memory, bandwidth, huge_pages = "keep";
  bool json = false;
  StoreArgument store;
  SnapshotOptions options;
};

constexpr const char* examples = R"(Examples:
  Snapshot a running VM:
    vmsnap snapshot --qmp /run/vm1.qmp --output /backup/vm1.img
  Into a store, which keeps what is new:
    vmsnap snapshot --qmp /run/vm1.qmp --store /backup/vms --tag nightly
  One that libvirt runs:
    vmsnap snapshot --libvirt vm1 --store /backup/vms --tag nightly
  With an LVM snapshot of its disk at the same instant:
    vmsnap snapshot --qmp /run/vm1.qmp --output vm1.img --disks none \
        --in-pause 'lvcreate -s -n vm1-snap -L 5G vg/vm1'
  Two ranges of memory of any process:
    vmsnap snapshot --pid 4711 --range 7f0000000000-7f0040000000 \
        --range 7f0080000000-7f0080200000 --output process.img

Exit status: 0 done, 1 input/output error, 2 wrong usage, 3 refused (the VM was
not touched), 4 missing privilege, 5 the VM failed or answered nonsense,
6 memory was discarded while copying, 7 no space, 8 FILE exists,
11 the --in-pause command failed, 130 interrupted.)";

// "7f00-7f80", hexadecimal, with or without 0x.
Result<RemoteRange> parse_range(const std::string& text) {
  const size_t dash = text.find('-');
  uint64_t bounds[2] = {};
  for (int i = 0; i < 2 && dash != std::string::npos; ++i) {
    std::string_view part = std::string_view(text).substr(i ? dash + 1 : 0, i ? std::string::npos : dash);
    if (part.starts_with("0x") || part.starts_with("0X")) part.remove_prefix(2);
    const auto parsed = std::from_chars(part.data(), part.data() + part.size(), bounds[i], 16);
    if (parsed.ec != std::errc() || parsed.ptr != part.data() + part.size()) bounds[0] = bounds[1] = 0;
  }
  if (bounds[1] <= bounds[0] || bounds[0] % page_size || bounds[1] % page_size) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("'{}' is not a range of whole pages", text))
            .with_remedy("Give START-END in hexadecimal, multiples of 1000 (4096), END not included."));
  }
  return RemoteRange{RemotePtr(bounds[0]), bounds[1] - bounds[0]};
}

nlohmann::json to_json(const SnapshotSummary& summary) {
  return {
      {"id", summary.id},
      {"file", summary.file},
      {"pause_ms", summary.pause_ms},
      {"total_ms", summary.total_ms},
      {"attach_ms", summary.attach_ms},
      {"copy_ms", summary.copy_ms},
      {"pages",
       {{"total", summary.total_pages},
        {"zero", summary.zero_pages},
        {"duplicate", summary.duplicate_pages},
        {"stored", summary.stored_pages}}},
      {"bytes", {{"guest", summary.total_pages * page_size}, {"image", summary.image_bytes}}},
      {"early_writes", summary.early_writes},
      {"write_faults", summary.write_faults},
      {"waited_ms", summary.waited_ms},
      {"huge_pages", {{"split", summary.split_huge_pages}, {"mended", summary.mended_huge_pages}}},
      {"fault_us",
       {{"p50", summary.fault_p50_us}, {"p99", summary.fault_p99_us}, {"max", summary.fault_max_us}}},
  };
}

void print_summary(std::ostream& out, const SnapshotSummary& summary) {
  constexpr double mib = 1 << 20;
  out << fmt::format(
      "snapshot {} saved as {}\n"
      "  paused {:.1f} ms, {:.2f} s in all\n"
      "  {:.0f} MiB of memory in {:.1f} MiB: {} pages zero, {} duplicate, {} stored\n"
      "  {} writes waited for their page: p50 {:.0f} us, p99 {:.0f} us, max {:.0f} us, {:.1f} ms in all\n",
      summary.id, summary.file, summary.pause_ms, summary.total_ms / 1000,
      static_cast<double>(summary.total_pages * page_size) / mib,
      static_cast<double>(summary.image_bytes) / mib, summary.zero_pages, summary.duplicate_pages,
      summary.stored_pages, summary.write_faults, summary.fault_p50_us, summary.fault_p99_us,
      summary.fault_max_us, summary.waited_ms);
  if (summary.split_huge_pages > 0) {
    out << fmt::format("  {} huge pages were split for writes that could not wait, {} made huge again\n",
                       summary.split_huge_pages, summary.mended_huge_pages);
  }
}

Status run(const Arguments& arguments, CommandContext& context) {
  const auto milliseconds = [](double seconds) {
    return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
  };
  VMSNAP_CHECK(check_key_has_store(arguments.store));
  SnapshotOptions options = arguments.options;
  options.store = arguments.store.options();
  options.without_disks = arguments.disks == "none";
  options.pause_command_limit = milliseconds(arguments.pause_command_limit_s);
  options.stall_limit = milliseconds(arguments.stall_limit_s);
  options.restore_wait = milliseconds(arguments.restore_wait_s);
  options.keep_huge_pages = arguments.huge_pages == "keep";
  if (!arguments.memory.empty()) options.memory = VMSNAP_TRY(parse_size(arguments.memory));
  if (!arguments.bandwidth.empty()) options.bytes_per_second = VMSNAP_TRY(parse_size(arguments.bandwidth));
  std::vector<RemoteRange> ranges;
  for (const std::string& text : arguments.ranges) ranges.push_back(VMSNAP_TRY(parse_range(text)));

  ProgressLine line(context.err, context.terminal && !arguments.json);
  const SnapshotProgress progress = [&](SnapshotPhase phase, const CaptureCounters* counters) {
    line.show(phase, counters);
  };
  const MonitorAddress monitor =
      arguments.libvirt.empty() ? MonitorAddress(arguments.qmp)
                                : MonitorAddress::of_domain(arguments.libvirt, arguments.connect);
  const auto summary = arguments.pid != 0
                           ? snapshot_process(arguments.pid, std::move(ranges), options, progress)
                           : snapshot_vm(monitor, options, progress);
  line.clear();
  if (!summary) return tl::unexpected(summary.error());
  if (arguments.json) {
    // On one line; a file's name need not be UTF-8.
    context.out << json_line(to_json(*summary))
                << "\n";
  } else {
    print_summary(context.out, *summary);
  }
  return {};
}

}  // namespace

void add_snapshot_command(CLI::App& app, CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();
  arguments->options.cpus = default_threads();
  CLI::App* command = app.add_subcommand("snapshot", "Snapshot a running VM, or memory of a process");
  command->footer(examples);

  auto* qmp = command->add_option("--qmp", arguments->qmp, "Monitor (QMP) socket of a running QEMU")
                  ->type_name("SOCKET");
  auto* libvirt = command->add_option("--libvirt", arguments->libvirt, "Domain that libvirt runs")
                      ->type_name("DOMAIN")
                      ->excludes(qmp);
  command->add_option("--connect", arguments->connect, "Which libvirt (default: the system's)")
      ->type_name("URI")
      ->needs(libvirt);
  auto* pid = command->add_option("--pid", arguments->pid, "Process whose memory to snapshot")
                  ->type_name("PID")
                  ->check(CLI::Range(1, 1 << 22))
                  ->excludes(qmp)
                  ->excludes(libvirt);
  auto* range = command->add_option("--range", arguments->ranges, "Addresses in it, hexadecimal (repeatable)")
                    ->type_name("START-END")
                    ->needs(pid);
  pid->needs(range);
  auto* output = command->add_option("-o,--output", arguments->options.output, "Image file to make")
                     ->type_name("FILE");
  auto* store = add_store_option(*command, arguments->store)->excludes(output);
  store->description("Store to put it into, made if it is not there");
  command->add_option("--tag", arguments->options.tags, "Word to find it by (repeatable)")
      ->type_name("TAG")
      ->allow_extra_args(false);
  command->add_option("--dedup-domain", arguments->options.dedup_domain,
                      "Share pages only with snapshots of the same domain")
      ->type_name("NAME")
      ->needs(store);
  command->add_flag("-f,--force", arguments->options.replace_output, "Replace FILE if it exists");
  command->add_option("--disks", arguments->disks, "'none': the image holds no disks, and I know")
      ->type_name("none")
      ->check(CLI::IsMember({"none"}));
  command->add_option("--in-pause", arguments->options.pause_command,
                      "Shell command to run while the VM stands still")
      ->type_name("COMMAND");
  command->add_option("--in-pause-limit", arguments->pause_command_limit_s,
                      "Seconds it may take (default 10)")
      ->type_name("SECONDS")
      ->check(CLI::Range(0.001, 86400.0));
  command->add_option("--stall-limit", arguments->stall_limit_s,
                      "Seconds the guest may wait for us before we give up (default 10)")
      ->type_name("SECONDS")
      ->check(CLI::Range(0.1, 86400.0));
  command->add_option("--restore-wait", arguments->restore_wait_s,
                      "Seconds to wait for a lazy restore of the VM to end (default 300)")
      ->type_name("SECONDS")
      ->check(CLI::Range(0.0, 86400.0));
  command->add_option("--cpus", arguments->options.cpus, "Processors to copy and compress with")
      ->type_name("N")
      ->check(CLI::Range(1, 256));
  command->add_option("--memory", arguments->memory, "Bytes of memory to stay within (64M, 1G)")
      ->type_name("SIZE");
  command->add_option("--bandwidth", arguments->bandwidth, "Bytes a second to write at most (64M)")
      ->type_name("SIZE");
  command->add_option("--huge-pages", arguments->huge_pages,
                      "'keep' them whole (default), or 'split' those that are written to")
      ->type_name("keep|split")
      ->check(CLI::IsMember({"keep", "split"}));
  command->add_flag("--copy-pinned", arguments->options.copy_pinned,
                    "If memory is pinned, copy all of it while the VM stands still")
      ->excludes(pid);
  add_delta_option(*command, arguments->options.deltas);
  command->add_option("--level", arguments->options.level, "zstd level (default -1; 5 with --delta)")
      ->type_name("N")
      ->check(CLI::Range(-7, 19));
  command->add_flag("--json", arguments->json, "Print one JSON object");

  command->callback([arguments, &context] {
    context.run = [arguments, &context]() -> Status {
      if (arguments->options.output.empty() && arguments->store.directory.empty()) {
        return fail(ErrorCode::usage, "give --output FILE or --store DIR");
      }
      if (arguments->qmp.empty() && arguments->libvirt.empty() && arguments->pid == 0) {
        return fail(ErrorCode::usage,
                    "give --qmp SOCKET, --libvirt DOMAIN, or --pid PID with --range START-END");
      }
      return run(*arguments, context);
    };
  });
}

}  // namespace vmsnap
