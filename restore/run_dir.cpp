#include "restore/run_dir.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "formats/interrupt.h"
#include "formats/json.h"
#include "restore/launch_rules.h"
#include "restore/record_fields.h"

namespace vmsnap {

namespace fs = std::filesystem;

namespace {

constexpr std::array phase_names = {
    std::string_view("starting"), std::string_view("launched"), std::string_view("registered"),
    std::string_view("loading"),  std::string_view("loaded"),   std::string_view("running"),
    std::string_view("parking"),  std::string_view("parked"),   std::string_view("filled"),   std::string_view("complete"), std::string_view("ended")};

Result<ServedRange> range_from_json(const nlohmann::json& json) {
  if (!json.is_object()) return tl::unexpected(wrong_field("ranges"));
  ServedRange range;
  constexpr uint64_t limit = uint64_t{1} << 56;  // of a user address, five-level paging
  range.name = VMSNAP_TRY(text_field(json, "name"));
  range.range.start = RemotePtr(VMSNAP_TRY(number_field(json, "host", limit)));
  range.range.length = VMSNAP_TRY(number_field(json, "length", limit));
  range.first_page = VMSNAP_TRY(number_field(json, "first_page", limit / page_size));
  range.unit = VMSNAP_TRY(number_field(json, "page_bytes", 1 << 30));
  if (range.unit != page_size && range.unit != DecodedExtent::max_pages * page_size) {
    return tl::unexpected(wrong_field("page_bytes"));
  }
  if (range.range.length == 0 || range.range.length % range.unit != 0 ||
      range.range.start.address() % range.unit != 0) {
    return tl::unexpected(wrong_field("ranges"));
  }
  return range;
}

Status check_no_overlap(std::vector<ServedRange> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const ServedRange& a, const ServedRange& b) {
    return a.range.start < b.range.start;
  });
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].range.start < ranges[i - 1].range.end()) return tl::unexpected(wrong_field("ranges"));
  }
  return {};
}

}  // namespace

std::string_view phase_name(RestorePhase phase) { return phase_names[static_cast<size_t>(phase)]; }

nlohmann::json to_json(const RestoreRecord& record) {
  nlohmann::json ranges = nlohmann::json::array();
  for (const ServedRange& range : record.ranges) {
    ranges.push_back({{"name", range.name},
                      {"host", range.range.start.address()},
                      {"length", range.range.length},
                      {"first_page", range.first_page},
                      {"page_bytes", range.unit}});
  }
  nlohmann::json json = {{"version", 1},
                         {"phase", phase_name(record.phase)},
                         {"image", record.image},
                         {"image_id", record.image_id},
                         {"qmp", record.qmp},
                         {"pid", record.pid},
                         {"start_time", record.start_time},
                         {"server_pid", record.server_pid},
                         {"resume", record.resume},
                         {"prefetch", prefetch_name(record.prefetch)},
                         {"record_working_set", record.record_working_set},
                         {"of_parked_vm", record.of_parked_vm},
                         {"ready_ms", record.ready_ms},
                         {"ranges", std::move(ranges)},
                         {"counters", record.counters}};
  if (record.uffd >= 0) json["uffd"] = record.uffd;
  if (record.clone) json["clone"] = true;
  return json;
}

Result<RestoreRecord> restore_record_from_json(const nlohmann::json& json) {
  if (!json.is_object()) return fail(ErrorCode::damaged, "it is not a JSON object");
  if (VMSNAP_TRY(number_field(json, "version", ~uint64_t{0})) != 1) {
    return fail(ErrorCode::unsupported, "it was written by a newer vmsnap");
  }
  RestoreRecord record;
  const std::string phase = VMSNAP_TRY(text_field(json, "phase"));
  const auto named = std::find(phase_names.begin(), phase_names.end(), phase);
  if (named == phase_names.end()) return tl::unexpected(wrong_field("phase"));
  record.phase = static_cast<RestorePhase>(named - phase_names.begin());
  record.image = VMSNAP_TRY(text_field(json, "image"));
  record.image_id = VMSNAP_TRY(text_field(json, "image_id"));
  record.qmp = VMSNAP_TRY(text_field(json, "qmp"));
  constexpr uint64_t largest_pid = 1 << 22;
  record.pid = static_cast<pid_t>(VMSNAP_TRY(number_field(json, "pid", largest_pid)));
  record.start_time = VMSNAP_TRY(number_field(json, "start_time", ~uint64_t{0}));
  record.server_pid = static_cast<pid_t>(VMSNAP_TRY(number_field(json, "server_pid", largest_pid)));
  if (json.contains("uffd")) {
    record.uffd = static_cast<int>(VMSNAP_TRY(number_field(json, "uffd", 1 << 30)));
  }
  record.resume = VMSNAP_TRY(flag_field(json, "resume"));
  // Not there: an older vmsnap wrote it.
  if (json.contains("prefetch")) {
    const auto prefetch = parse_prefetch(VMSNAP_TRY(text_field(json, "prefetch")));
    if (!prefetch) return tl::unexpected(wrong_field("prefetch"));
    record.prefetch = *prefetch;
  }
  if (json.contains("clone")) record.clone = VMSNAP_TRY(flag_field(json, "clone"));
  if (json.contains("record_working_set")) {
    record.record_working_set = VMSNAP_TRY(flag_field(json, "record_working_set"));
  }
  if (json.contains("of_parked_vm")) record.of_parked_vm = VMSNAP_TRY(flag_field(json, "of_parked_vm"));
  const auto ready = json.find("ready_ms");
  if (ready == json.end() || !ready->is_number()) return tl::unexpected(wrong_field("ready_ms"));
  record.ready_ms = ready->get<double>();
  const auto ranges = json.find("ranges");
  if (ranges == json.end() || !ranges->is_array()) return tl::unexpected(wrong_field("ranges"));
  for (const nlohmann::json& range : *ranges) {
    record.ranges.push_back(VMSNAP_TRY(range_from_json(range)));
  }
  VMSNAP_CHECK(check_no_overlap(record.ranges));
  if (json.contains("counters")) record.counters = json["counters"];
  return record;
}

Result<Fd> lock_run_directory(const std::string& path, std::chrono::milliseconds patience) {
  const std::string name = path + "/lock";
  Fd lock = VMSNAP_TRY(open_file(name, O_RDWR | O_CREAT | O_NOFOLLOW));
  const auto deadline = std::chrono::steady_clock::now() + patience;
  do {
    if (VMSNAP_TRY(lock_whole_file(lock.get(), name))) return lock;
    VMSNAP_CHECK(check_interrupted());
    if (patience.count() > 0) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  } while (std::chrono::steady_clock::now() < deadline);
  std::string owner;
  if (const auto record = read_restore_record(path)) {
    owner = fmt::format(" (process {})", record->server_pid);
  }
  return tl::unexpected(
      Error(ErrorCode::exists, fmt::format("a page server{} is at work in {}", owner, path))
          .with_remedy("Choose another --run-dir; there is nothing to take over."));
}

Status RunDir::take_lock(std::chrono::milliseconds patience) {
  lock_ = VMSNAP_TRY(lock_run_directory(path_, patience));
  return {};
}

Result<RunDir> RunDir::open(const std::string& path, std::chrono::milliseconds patience) {
  RunDir dir;
  std::error_code failed;
  dir.path_ = fs::canonical(path, failed).string();
  if (failed) return fail_errno(failed.value(), "cannot open the run directory {}", path);
  const RestoreRecord record = VMSNAP_TRY(dir.read());
  // Nobody is to be kept off where no VM is served, and a lock that went with
  // the page server is not left there anew.
  const bool over = record.phase >= RestorePhase::complete || !find_process(record);
  if (over && !fs::exists(dir.file("lock"))) return dir;
  VMSNAP_CHECK(dir.take_lock(patience));
  return dir;
}

Result<std::string> default_run_directories() {
  std::string parent = "/run/vmsnap";
  if (::geteuid() != 0) {
    const char* runtime = std::getenv("XDG_RUNTIME_DIR");
    if (!runtime || runtime[0] != '/') {
      return tl::unexpected(Error(ErrorCode::usage, "there is no place for the run directory")
                                .with_remedy("Give --run-dir, or set XDG_RUNTIME_DIR."));
    }
    parent = std::string(runtime) + "/vmsnap";
  }
  if (::mkdir(parent.c_str(), 0700) < 0 && errno != EEXIST) {
    return fail_errno(errno, "cannot make directory {}", parent);
  }
  return parent;
}

Result<std::string> make_run_directory(const std::string& path, bool* made) {
  bool unused;
  if (!made) made = &unused;
  *made = true;
  if (path.empty()) {
    std::string name = VMSNAP_TRY(default_run_directories()) + "/vmsnap-XXXXXX";
    if (!::mkdtemp(name.data())) return fail_errno(errno, "cannot make directory {}", name);
    return name;
  }
  *made = ::mkdir(path.c_str(), 0700) == 0;
  if (!*made && errno != EEXIST) return fail_errno(errno, "cannot make directory {}", path);
  std::error_code failed;
  std::string absolute = fs::canonical(path, failed).string();
  if (failed) return fail_errno(failed.value(), "cannot open the run directory {}", path);
  return absolute;
}

Result<RunDir> RunDir::create(const std::string& path) {
  RunDir dir;
  dir.path_ = VMSNAP_TRY(make_run_directory(path, &dir.made_));
  VMSNAP_CHECK(dir.take_lock());
  if (fs::exists(dir.file("restore.json"))) {
    const RestoreRecord before = VMSNAP_TRY(dir.read());
    const bool is_past = before.of_parked_vm && before.phase == RestorePhase::complete;
    if (const auto process = find_process(before); process && !is_past) {
      return tl::unexpected(Error(ErrorCode::exists, fmt::format("{} still runs in {}",
                                                                 process->describe(), dir.path_))
                                .with_remedy("Choose another --run-dir, or end that VM first."));
    }
  }
  return dir;
}

Status RunDir::write(const RestoreRecord& record) const {
  // A name from somebody's command line need not be UTF-8.
  return write_small_file(file("restore.json"), json_lines(to_json(record)));
}

Result<RestoreRecord> read_restore_record(const std::string& run_dir) {
  const std::string name = run_dir + "/restore.json";
  const std::string contents = VMSNAP_TRY(read_own_file(name, 4 << 20));
  auto record = restore_record_from_json(parse_json(contents));
  if (record) return record;
  return tl::unexpected(
      std::move(record).error().with_context(name).with_remedy("Choose another --run-dir."));
}

Status check_ranges(const RestoreRecord& record, uint64_t image_pages) {
  std::vector<ServedRange> ranges = record.ranges;
  std::ranges::sort(ranges, {}, &ServedRange::first_page);
  // Memory that is in none would be zeros once the others are there.
  uint64_t covered = 0;
  for (const ServedRange& range : ranges) {
    if (range.first_page != covered || range.page_count() > image_pages - covered) {
      return fail(ErrorCode::damaged, "restore.json: range '{}' is not where it is in the image",
                  range.name);
    }
    covered += range.page_count();
  }
  if (covered == image_pages) return {};
  return fail(ErrorCode::damaged, "restore.json: its ranges are {} of the image's {} pages", covered,
              image_pages);
}

Result<std::unique_ptr<ImageReader>> open_recorded_image(const std::string& path,
                                                         const std::string& id,
                                                         const KeySource& key) {
  auto image = VMSNAP_TRY(open_image({path, {.directory = {}, .key = key}, {}}));
  if (image->info().id == id) return image;
  return fail(ErrorCode::damaged, "{} is not the image that this VM was restored from ({}, not {})",
              path, image->info().id, id);
}

Result<Process> find_process(const RestoreRecord& record) {
  auto process = record.pid > 0 ? Process::open(record.pid)
                                : Result<Process>(fail(ErrorCode::vm, "it was never started"));
  if (process && process->start_time() == record.start_time) return process;
  if (record.phase == RestorePhase::parked) {
    return tl::unexpected(
        Error(ErrorCode::vm, fmt::format("the parked VM (process {}) has ended; its memory is in {}",
                                         record.pid, record.image))
            .with_remedy(fmt::format("If it has not run since it was parked, start it again from there: "
                                     "vmsnap restore {}", shell_quoted(record.image))));
  }
  return fail(ErrorCode::vm, "the VM (process {}) has ended; its memory went with it", record.pid);
}

void RunDir::undo() {
  std::error_code ignored;
  if (made_) {
    fs::remove_all(path_, ignored);
    return;
  }
  for (const char* name : {"restore.json", "pages", "control", "qmp.sock", "qemu.pid", "lock"}) {
    fs::remove(file(name), ignored);
  }
}

void RunDir::finish() {
  std::error_code ignored;
  for (const char* name : {"pages", "control", "lock"}) fs::remove(file(name), ignored);
}

}  // namespace vmsnap
