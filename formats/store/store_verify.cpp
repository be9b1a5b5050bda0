#include "formats/store/store_verify.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <map>

#include "formats/clock.h"
#include "formats/damage.h"
#include "formats/interrupt.h"
#include "formats/log.h"
#include "formats/page_entry.h"
#include "formats/store/frame_tables.h"
#include "formats/store/pack_set.h"
#include "formats/store/verify_state.h"

namespace vmsnap {

namespace {

constexpr std::chrono::seconds save_every{5};
constexpr size_t max_rows_kept = 16;  // that differ, of one pack

class StoreVerifier {
 public:
  StoreVerifier(const Store& store, const StoreVerifyOptions& options,
                const std::function<void(const StoreVerifyProgress&)>& progress)
      : store_(store),
        options_(options),
        show_progress_(progress),
        tables_(store.paths(), store.master()) {
    report_.store = store.paths().root;
  }

  Result<StoreVerifyReport> run();

 private:
  struct Pack {
    enum class Known { nothing, whole, damaged } known = Known::nothing;
    bool missing = false;
    std::vector<layout::PackRow> rows;  // that differ
    uint64_t bytes = 0;
    PackCheck check;  // if known; if whole, only the digest of it
  };
  struct Manifest {
    std::string id;
    bool in_trash = false;
  };
  using Packs = std::map<layout::ImageId, Pack>;

  bool everything() const { return options_.snapshots.empty() && options_.sample >= 1; }

  Status find_manifests();
  Status note_packs(const Manifest& manifest);
  void measure_packs();
  std::vector<Packs::iterator> packs_due();
  Status check_packs();
  Status check_one_pack(Packs::iterator pack);
  void save_state();

  Status check_manifest(const Manifest& manifest);
  Status check_page(const std::string& path, const PackSet& files,
                    std::span<const layout::PackRow> rows, uint64_t entry);

  Result<ImageFile> open(const Manifest& manifest, std::string& path) const;
  Status unreadable(const Manifest& manifest, const std::string& path, const Error& error);

  const Store& store_;
  const StoreVerifyOptions& options_;
  const std::function<void(const StoreVerifyProgress&)>& show_progress_;
  StoreVerifyReport report_;
  StoreVerifyProgress progress_;
  VerifyState state_;  // as it was in the beginning, but for when this run began
  std::map<layout::ImageId, VerifyState::Pack> verified_;  // by this run
  std::chrono::steady_clock::time_point saved_ = std::chrono::steady_clock::now();
  bool cannot_save_ = false;
  std::vector<Manifest> manifests_;
  Packs packs_;
  FrameTables tables_;
};

Result<StoreVerifyReport> StoreVerifier::run() {
  state_ = VerifyState::load(store_.paths());
  VMSNAP_CHECK(find_manifests());
  std::vector<Manifest> readable;
  for (const Manifest& manifest : manifests_) {
    VMSNAP_CHECK(check_interrupted());
    const size_t bad = report_.unreadable.size();
    VMSNAP_CHECK(note_packs(manifest));
    if (report_.unreadable.size() == bad) readable.push_back(manifest);
  }
  manifests_ = std::move(readable);
  measure_packs();
  VMSNAP_CHECK(check_packs());
  for (const Manifest& manifest : manifests_) {
    VMSNAP_CHECK(check_manifest(manifest));
    VMSNAP_CHECK(check_interrupted());  // then it was not looked at whole
  }
  // Only now: a run that is stopped while it checks manifests has not ended.
  if (everything()) state_.began_unix_ms = 0;
  save_state();
  return std::move(report_);
}

Status StoreVerifier::find_manifests() {
  std::vector<Manifest> all;
  for (const std::string& id : VMSNAP_TRY(manifest_ids(store_.paths().snapshots()))) {
    all.push_back({id, false});
  }
  for (const std::string& id : VMSNAP_TRY(manifest_ids(store_.paths().trash()))) {
    all.push_back({id, true});
  }
  std::ranges::sort(all, {}, &Manifest::id);
  if (options_.snapshots.empty()) {
    manifests_ = std::move(all);
    return {};
  }
  for (const std::string& id : options_.snapshots) {
    const auto found = std::ranges::find(all, id, &Manifest::id);
    if (found == all.end()) {
      return tl::unexpected(
          Error(ErrorCode::usage,
                fmt::format("there is no snapshot '{}' in the store {}", id, report_.store))
              .with_remedy("'vmsnap list --store " + report_.store + "' shows what there is."));
    }
    manifests_.push_back(*found);
  }
  return {};
}

// Wherever it is now: it may go into the trash and come back any time.
Result<ImageFile> StoreVerifier::open(const Manifest& manifest, std::string& path) const {
  const StorePaths& paths = store_.paths();
  path = manifest.in_trash ? paths.in_trash(manifest.id) : paths.snapshot(manifest.id);
  auto file = store_.open_manifest(path);
  if (file || file.error().os_errno() != ENOENT) return file;
  const std::string other =
      manifest.in_trash ? paths.snapshot(manifest.id) : paths.in_trash(manifest.id);
  file = store_.open_manifest(other);
  if (file || file.error().os_errno() != ENOENT) path = other;
  return file;
}

// Into the report, unless it is gone, or the trouble is ours.
Status StoreVerifier::unreadable(const Manifest& manifest, const std::string& path,
                                 const Error& error) {
  if (error.os_errno() == ENOENT) return {};
  const bool damaged = says_damage(error);
  if (!damaged && error.code() != ErrorCode::unsupported) return tl::unexpected(error);
  report_.unreadable.push_back({.id = manifest.id,
                                .path = path,
                                .in_trash = manifest.in_trash,
                                .reason = error.message(),
                                .damaged = damaged});
  report_.repairable |= damaged;
  return {};
}

Status StoreVerifier::note_packs(const Manifest& manifest) {
  std::string path;
  const auto rows = [&]() -> Result<std::vector<layout::PackRow>> {
    const ImageFile file = VMSNAP_TRY(open(manifest, path));
    if (VMSNAP_TRY(file.read_info()).id != manifest.id) {
      return damaged(path, "it is another snapshot than its name says");
    }
    return VMSNAP_TRY(file.read_packs());
  }();
  if (!rows) return unreadable(manifest, path, rows.error());
  for (const layout::PackRow& row : *rows) {
    if (row.referenced == 0) continue;
    std::vector<layout::PackRow>& known = packs_[row.id].rows;
    const bool is_known = std::ranges::any_of(known, [&](const layout::PackRow& other) {
      return other.digest == row.digest && other.frames_end == row.frames_end;
    });
    if (!is_known && known.size() < max_rows_kept) known.push_back(row);
  }
  return {};
}

void StoreVerifier::measure_packs() {
  report_.packs = packs_.size();
  for (auto& [id, pack] : packs_) {
    struct stat status;
    const auto path = store_.paths().find_pack(id);
    pack.missing = !path && says_damage(path.error());
    if (path && ::stat(path->c_str(), &status) == 0) {
      pack.bytes = static_cast<uint64_t>(status.st_size);
    }
    if (!pack.missing) continue;
    pack.known = Pack::Known::damaged;
    report_.missing_packs.push_back(id);
  }
}

std::vector<StoreVerifier::Packs::iterator> StoreVerifier::packs_due() {
  const bool resume = options_.resume && state_.began_unix_ms != 0;
  if (everything() && !resume) state_.began_unix_ms = now_unix_ms();
  // Those with damage first, then those that were never verified.
  std::vector<std::pair<int64_t, Packs::iterator>> order;
  uint64_t total = 0;
  for (auto pack = packs_.begin(); pack != packs_.end(); ++pack) {
    total += pack->second.bytes;
    if (pack->second.missing) continue;
    const auto last = state_.packs.find(pack->first);
    const bool verified = last != state_.packs.end();
    if (verified && last->second.ok && resume && last->second.at_unix_ms >= state_.began_unix_ms) {
      pack->second.known = Pack::Known::whole;
      ++report_.packs_resumed;
      continue;
    }
    order.emplace_back(!verified ? 0 : last->second.ok ? last->second.at_unix_ms : -1, pack);
  }
  std::ranges::stable_sort(order, {}, [](const auto& entry) { return entry.first; });
  std::vector<Packs::iterator> due;
  uint64_t left = options_.sample >= 1
                      ? total
                      : static_cast<uint64_t>(std::max(0.0, options_.sample) * static_cast<double>(total));
  for (const auto& [at, pack] : order) {
    if (options_.sample < 1 && at >= 0) {
      if (left == 0) break;
      left -= std::min(left, pack->second.bytes);
    }
    due.push_back(pack);
  }
  return due;
}

Status StoreVerifier::check_packs() {
  const auto due = packs_due();
  progress_.packs = due.size();
  for (const auto& pack : due) progress_.bytes += pack->second.bytes;
  save_state();
  for (const auto& pack : due) {
    const Status go_on = check_interrupted();
    if (!go_on) {
      save_state();
      return go_on;
    }
    if (show_progress_) show_progress_(progress_);
    VMSNAP_CHECK(check_one_pack(pack));
    ++progress_.packs_done;
    progress_.bytes_done += pack->second.bytes;
    if (std::chrono::steady_clock::now() - saved_ > save_every) save_state();
  }
  if (show_progress_) show_progress_(progress_);
  save_state();
  return {};
}

Status StoreVerifier::check_one_pack(Packs::iterator entry) {
  auto& [id, pack] = *entry;
  PackCheck check = VMSNAP_TRY(check_pack(store_.paths(), id, store_.master(), pack.rows));
  verified_[id] = {.at_unix_ms = now_unix_ms(), .ok = check.whole()};
  ++report_.packs_checked;
  report_.bytes_checked += check.bytes;
  report_.frames_checked += check.frames;
  pack.known = check.whole() ? Pack::Known::whole : Pack::Known::damaged;
  if (!check.whole()) {
    report_.damaged_packs.push_back(check);
    report_.repairable |= !check.path.starts_with(store_.paths().quarantine() + "/");
  }
  pack.check = std::move(check);
  return {};
}

// Without it the next run reads more than it must, no more.
void StoreVerifier::save_state() {
  const Status saved = VerifyState::update(store_.paths(), [&](VerifyState& noted) {
    for (const auto& [id, pack] : verified_) noted.add(id, pack);
    // Not those that came since, and were verified by another run.
    const auto is_gone = [&](const auto& entry) {
      return state_.packs.contains(entry.first) && !packs_.contains(entry.first);
    };
    if (options_.snapshots.empty()) std::erase_if(noted.packs, is_gone);
    if (everything()) noted.began_unix_ms = state_.began_unix_ms;
  });
  saved_ = std::chrono::steady_clock::now();
  if (saved || cannot_save_) return;
  cannot_save_ = true;
  log_warning("what was verified cannot be noted: {}", saved.error().message());
}

Status StoreVerifier::check_manifest(const Manifest& manifest) {
  std::string path;
  const auto checked = [&]() -> Result<StoreVerifyReport::Snapshot> {
    const ImageFile file = VMSNAP_TRY(open(manifest, path));
    const ImageInfo info = VMSNAP_TRY(file.read_info());
    const auto rows = VMSNAP_TRY(file.read_packs());
    PackSet files(store_.paths(), store_.master());
    files.add_rows(rows);
    std::vector<uint64_t> references(rows.size());
    uint64_t data_pages = 0;
    VerifyReport report = verify_manifest(file, info, [&](uint64_t entry) {
      const uint64_t pack = PageEntry::from_bits(entry).pack;
      ++data_pages;
      if (pack != 0 && pack <= rows.size()) ++references[pack - 1];
      return check_page(path, files, rows, entry);
    });
    const auto other = [&](const Error& error) {
      ++report.damage_count;
      report.other_damage.push_back(error.message());
    };
    const auto working_set = file.read_working_set();
    if (!working_set) other(working_set.error());
    const bool all_seen = data_pages + report.zero_pages == report.page_count;
    for (size_t i = 0; all_seen && i < rows.size(); ++i) {
      if (references[i] == rows[i].referenced) continue;
      other(damage(path, "{} of its pages are in pack {}, but it says {}", references[i],
                   id_text(rows[i].id), rows[i].referenced));
      break;
    }
    return StoreVerifyReport::Snapshot{.id = manifest.id,
                                       .vm = vm_name(info),
                                       .created_unix_ms = info.created_unix_ms,
                                       .in_trash = path == store_.paths().in_trash(manifest.id),
                                       .report = std::move(report)};
  }();
  if (!checked) return unreadable(manifest, path, checked.error());
  ++report_.snapshots;
  if (!checked->report.ok()) report_.damaged_snapshots.push_back(std::move(*checked));
  return {};
}

// Neither the frame nor its base may be among bytes that are not as they were
// written, although their checksums are right.
Status check_doubts(const PackCheck& check, const FrameSource& pack, uint64_t frame) {
  if (check.doubtful.empty()) return {};
  const uint64_t base = VMSNAP_TRY(base_of_stored_page(pack, frame));
  for (const uint64_t offset : {frame, base}) {
    if (!check.doubts(offset)) continue;
    return damaged(check.path, "the page frame at byte {} is not as it was written", offset);
  }
  return {};
}

Status StoreVerifier::check_page(const std::string& path, const PackSet& files,
                                 std::span<const layout::PackRow> rows, uint64_t bits) {
  const PageEntry entry = PageEntry::from_bits(bits);
  if (entry.kind != PageEntry::kind_frame || entry.pack == 0 || entry.pack > rows.size()) {
    return damaged(path, "a page entry refers to no pack ({:#018x})", bits);
  }
  const layout::PackRow& row = rows[entry.pack - 1];
  const auto found = packs_.find(row.id);
  // Its manifest was rewritten since packs were looked at.
  if (found == packs_.end()) return {};
  const Pack& pack = found->second;
  if (pack.missing) {
    return fail(ErrorCode::damaged, "pack {} is not in the store {}", id_text(row.id),
                report_.store);
  }
  if (pack.known == Pack::Known::nothing) return {};
  if (pack.check.digest && *pack.check.digest != row.digest) {
    return damaged(path, "pack {} is not the one that it refers to", id_text(row.id));
  }
  std::array<std::byte, page_size> bytes;
  if (pack.known == Pack::Known::damaged) {
    const FrameSource source = VMSNAP_TRY(files.source(entry.pack));
    VMSNAP_CHECK(check_doubts(pack.check, source, entry.offset));
    return read_stored_page(source, bits, bytes);
  }
  if (entry.slot != 0) return read_stored_page(files, bits, bytes);
  if (entry.offset < row.frames_end && VMSNAP_TRY(tables_.begins(row.id, entry.offset))) return {};
  return damaged(path, "no page frame of pack {} begins at byte {}", id_text(row.id), entry.offset);
}

}  // namespace

Status StoreVerifyReport::status() const {
  if (ok()) return {};
  std::string what;
  const auto add = [&](size_t count, const char* one, const char* many) {
    if (count == 0) return;
    if (!what.empty()) what += ", ";
    what += fmt::format("{} {}", count, count == 1 ? one : many);
  };
  add(damaged_packs.size(), "damaged pack", "damaged packs");
  add(missing_packs.size(), "missing pack", "missing packs");
  add(unreadable.size(), "manifest that cannot be read", "manifests that cannot be read");
  add(damaged_snapshots.size(), "snapshot that is not whole", "snapshots that are not whole");
  return tl::unexpected(
      Error(ErrorCode::damaged, fmt::format("the store {} is damaged: {}", store, what))
          .with_remedy(repairable
                           ? "'vmsnap repair --store " + store +
                                 "' puts aside what is damaged, so that new snapshots store anew "
                                 "what was lost."
                           : "What can be put aside is; take new snapshots, and remove those that "
                             "are not whole when their other pages are not needed any more."));
}

Result<StoreVerifyReport> verify_store(
    const Store& store, const StoreVerifyOptions& options,
    const std::function<void(const StoreVerifyProgress&)>& progress) {
  return StoreVerifier(store, options, progress).run();
}

}  // namespace vmsnap
