#include "restore/farm/farm_dir.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>

#include "formats/json.h"
#include "restore/record_fields.h"

namespace vmsnap {

namespace fs = std::filesystem;

namespace {

// A clone's number; 0: not a clone's directory.
uint64_t clone_number(const std::string& name) {
  uint64_t number = 0;
  const auto [end, failed] = std::from_chars(name.data(), name.data() + name.size(), number);
  if (failed != std::errc() || end != name.data() + name.size() || name[0] == '0') return 0;
  return number;
}

Result<FarmRecord> farm_record_from_json(const nlohmann::json& json) {
  if (!json.is_object()) return fail(ErrorCode::damaged, "it is not a JSON object");
  if (VMSNAP_TRY(number_field(json, "version", ~uint64_t{0})) != 1) {
    return fail(ErrorCode::unsupported, "it was written by a newer vmsnap");
  }
  FarmRecord record;
  record.image = VMSNAP_TRY(text_field(json, "image"));
  record.image_id = VMSNAP_TRY(text_field(json, "image_id"));
  const auto prefetch = parse_prefetch(VMSNAP_TRY(text_field(json, "prefetch")));
  if (!prefetch) return tl::unexpected(wrong_field("prefetch"));
  record.prefetch = *prefetch;
  record.memory = VMSNAP_TRY(number_field(json, "memory", ~uint64_t{0}));
  record.keeper_pid = static_cast<pid_t>(VMSNAP_TRY(number_field(json, "keeper_pid", 1 << 22)));
  // Not there: an older vmsnap wrote it.
  if (json.contains("unreadable")) {
    record.unreadable = VMSNAP_TRY(number_field(json, "unreadable", ~uint64_t{0}));
  }
  return record;
}

}  // namespace

Result<FarmDir> FarmDir::make(const std::string& path, bool* made) {
  FarmDir dir;
  dir.path_ = VMSNAP_TRY(make_run_directory(path, made));
  return dir;
}

Result<FarmDir> FarmDir::open(const std::string& path) {
  FarmDir dir;
  std::error_code failed;
  dir.path_ = fs::canonical(path, failed).string();
  if (failed) return fail_errno(failed.value(), "cannot open the run directory {}", path);
  if (!fs::exists(dir.file("farm.json"))) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("{} is no run directory of clones", dir.path_))
            .with_remedy("Give the --run-dir that vmsnap restore --clones printed."));
  }
  return dir;
}

Status FarmDir::write(const FarmRecord& record) const {
  const nlohmann::json json = {{"version", 1},
                               {"image", record.image},
                               {"image_id", record.image_id},
                               {"prefetch", prefetch_name(record.prefetch)},
                               {"memory", record.memory},
                               {"keeper_pid", static_cast<uint64_t>(record.keeper_pid)},
                               {"unreadable", record.unreadable}};
  return write_small_file(file("farm.json"),
                          json_lines(json));
}

Result<FarmRecord> FarmDir::read() const {
  const std::string name = file("farm.json");
  const std::string contents = VMSNAP_TRY(read_own_file(name, 1 << 20));
  auto record = farm_record_from_json(parse_json(contents));
  if (record) return record;
  return tl::unexpected(
      std::move(record).error().with_context(name).with_remedy("Choose another --run-dir."));
}

std::vector<std::string> FarmDir::clones() const {
  std::vector<std::string> names;
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator(path_, failed)) {
    std::string name = entry.path().filename().string();
    if (clone_number(name) > 0) names.push_back(std::move(name));
  }
  std::sort(names.begin(), names.end(), [](const std::string& a, const std::string& b) {
    return clone_number(a) < clone_number(b);
  });
  return names;
}

Result<std::string> FarmDir::new_clone() const {
  const std::vector<std::string> there = clones();
  uint64_t number = there.empty() ? 1 : clone_number(there.back()) + 1;
  for (;; ++number) {  // somebody else may start clones, too
    const std::string name = std::to_string(number);
    if (::mkdir(file(name).c_str(), 0700) == 0) return name;
    if (errno != EEXIST) return fail_errno(errno, "cannot make directory {}", file(name));
  }
}

}  // namespace vmsnap
