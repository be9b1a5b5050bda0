#include "restore/farm/clones_command.h"

#include <algorithm>
#include <filesystem>
#include <thread>

#include "formats/interrupt.h"
#include "formats/json.h"
#include "formats/size.h"
#include "restore/farm/farm_dir.h"
#include "restore/farm/farm_link.h"
#include "restore/farm/shared_memory.h"
#include "restore/launch.h"
#include "snap/vmm/qmp.h"

namespace vmsnap {

namespace {

struct ListedClone {
  std::string name;
  RestoreRecord record;
  std::optional<Process> process;  // none: it has ended
};

Result<std::vector<ListedClone>> find_clones(const FarmDir& farm,
                                             const std::vector<std::string>& names) {
  const std::vector<std::string> there = farm.clones();
  for (const std::string& name : names) {
    if (std::find(there.begin(), there.end(), name) != there.end()) continue;
    return fail(ErrorCode::usage, "{} has no clone \"{}\"", farm.path(), name);
  }
  std::vector<ListedClone> clones;
  for (const std::string& name : names.empty() ? there : names) {
    auto record = read_restore_record(farm.file(name));
    if (!record) continue;  // it is being made, or never came to anything
    ListedClone clone = {name, *std::move(record), {}};
    if (auto process = find_process(clone.record)) clone.process = *std::move(process);
    clones.push_back(std::move(clone));
  }
  return clones;
}

std::string_view state_of(const ListedClone& clone) {
  if (!clone.process) return "ended";
  if (clone.record.phase < RestorePhase::loaded) return "starting";
  return "alive";
}

nlohmann::json describe(const ListedClone& clone) {
  nlohmann::json json = {{"clone", clone.name},       {"state", state_of(clone)},
                         {"pid", clone.record.pid},   {"qmp", clone.record.qmp},
                         {"ready_ms", clone.record.ready_ms}};
  if (!clone.process) return json;
  if (const auto memory = clone_memory(*clone.process)) {
    json["memory"] = {{"mapped", memory->mapped},
                      {"shared", memory->shared},
                      {"own", memory->own},
                      {"proportional", memory->proportional}};
  }
  return json;
}

double mib(const nlohmann::json& memory, const char* field) {
  return static_cast<double>(memory.value(field, uint64_t{0})) / (1 << 20);
}

// After --wait, --stop or --remove: none of them is alive.
void report_the_end(const FarmDir& farm, const std::vector<ListedClone>& ended,
                    CommandContext& context) {
  nlohmann::json clones = nlohmann::json::array();
  for (const ListedClone& clone : ended) {
    const bool there = std::filesystem::exists(farm.file(clone.name));
    clones.push_back({{"clone", clone.name},
                      {"state", there ? "ended" : "removed"},
                      {"pid", clone.record.pid}});
  }
  print_json(context.out, {{"run_dir", farm.path()}, {"clones", std::move(clones)}});
}

Status list(const FarmDir& farm, const ClonesOptions& options, CommandContext& context) {
  const FarmRecord record = VMSNAP_TRY(farm.read());
  nlohmann::json server = nullptr;  // null: there is none
  if (const auto connection = connect_for_messages(farm.socket())) {
    if (auto status = ask(connection->get(), {{"do", "status"}})) server = std::move(status->json);
  }
  nlohmann::json clones = nlohmann::json::array();
  for (const ListedClone& clone : VMSNAP_TRY(find_clones(farm, options.names))) {
    clones.push_back(describe(clone));
  }
  if (options.json) {
    const nlohmann::json all = {{"run_dir", farm.path()},  {"image", record.image},
                                {"id", record.image_id},   {"server", std::move(server)},
                                {"clones", std::move(clones)}};
    print_json(context.out, all);
    return {};
  }
  context.out << fmt::format("clones of {}\n", record.image);
  if (server.is_null()) {
    context.out << "no page server; if clones live: vmsnap restore --reattach " << farm.path() << "\n";
  } else {
    context.out << fmt::format(
        "page server {}: {:.1f} MiB shared, {} pages read, {} dropped, {} faults\n",
        server.value("server_pid", 0),
        static_cast<double>(server.value("resident_pages", uint64_t{0})) / 256,
        server.value("read_pages", uint64_t{0}), server.value("dropped_pages", uint64_t{0}),
        server.value("faults", uint64_t{0}));
  }
  context.out << fmt::format("{:>6} {:>8} {:<9} {:>12} {:>12}  {}\n", "clone", "pid", "state",
                             "shared MiB", "own MiB", "monitor");
  for (const nlohmann::json& clone : clones) {
    const nlohmann::json memory = clone.value("memory", nlohmann::json::object());
    context.out << fmt::format("{:>6} {:>8} {:<9} {:>12.1f} {:>12.1f}  {}\n",
                               clone.value("clone", ""), clone.value("pid", 0),
                               clone.value("state", ""), mib(memory, "shared"), mib(memory, "own"),
                               clone.value("qmp", ""));
  }
  return {};
}

void ask_to_quit(const ListedClone& clone) {
  if (auto qmp = Qmp::connect(clone.record.qmp, std::chrono::seconds(2))) (void)qmp->execute("quit");
}

Status stop_all(const std::vector<ListedClone>& clones) {
  for (const ListedClone& clone : clones) {
    if (clone.process) ask_to_quit(clone);
  }
  for (const ListedClone& clone : clones) {
    if (!clone.process || clone.process->wait_for_end(std::chrono::seconds(10))) continue;
    kill_and_wait(*clone.process);
  }
  return {};
}

Status wait_for_all(const std::vector<ListedClone>& clones) {
  for (const ListedClone& clone : clones) {
    while (clone.process && !clone.process->wait_for_end(std::chrono::milliseconds(200))) {
      VMSNAP_CHECK(check_interrupted());
    }
  }
  return {};
}

// The keeper writes down the end of each; its directory must not go before.
void remove_directory(const FarmDir& farm, const std::string& name) {
  for (int i = 0; i < 50; ++i) {
    const auto record = read_restore_record(farm.file(name));
    if (!record || record->phase == RestorePhase::ended || !connect_for_messages(farm.socket())) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  std::error_code ignored;
  std::filesystem::remove_all(farm.file(name), ignored);
}

}  // namespace

Status run_clones(const ClonesOptions& options, CommandContext& context) {
  const FarmDir farm = VMSNAP_TRY(FarmDir::open(options.run_dir));
  if (!options.stop && !options.wait && !options.remove) return list(farm, options, context);
  const std::vector<ListedClone> clones = VMSNAP_TRY(find_clones(farm, options.names));
  if (options.stop || options.remove) VMSNAP_CHECK(stop_all(clones));
  VMSNAP_CHECK(wait_for_all(clones));
  if (options.remove) {
    for (const ListedClone& clone : clones) remove_directory(farm, clone.name);
  }
  if (options.json) report_the_end(farm, clones, context);
  return {};
}

}  // namespace vmsnap
