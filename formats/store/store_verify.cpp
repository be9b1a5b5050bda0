#include "formats/store/store_verify.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "formats/damage.h"
#include "formats/interrupt.h"
#include "formats/log.h"
#include "formats/page_codec.h"
#include "formats/page_entry.h"
#include "formats/page_tree.h"
#include "formats/store/pack_file.h"
#include "formats/store/pack_set.h"

namespace vmsnap {

namespace {

// What a pack turned out to be.
struct PackState {
  bool whole = true;                 // false: nothing of it can be read
  std::set<uint64_t> lost;           // offsets of frames
};

struct Needed {
  layout::PackRow row = {};
  int64_t checked_unix_ms = 0;  // the last time
  uint64_t bytes = 0;
};

class StoreVerifier {
 public:
  StoreVerifier(const Store& store, const StoreVerifyOptions& options,
                const std::function<void(int)>& progress)
      : store_(store), options_(options), progress_(progress) {}

  Result<StoreVerifyReport> run();

 private:
  Status read_manifests(Where where);
  void check_tree(const ImageFile& manifest, const SnapshotEntry& entry);
  void read_state();
  void write_state() const;
  Status check_packs();
  Status check_pack(const Needed& needed, PackState& state);
  Status check_segment(const PackFile& pack, const layout::PackSegment& segment,
                       const FrameSource& source, PackState& state);
  void find_lost_pages();
  void add_lost(const SnapshotEntry& entry, uint64_t page);

  const Store& store_;
  const StoreVerifyOptions& options_;
  const std::function<void(int)>& progress_;
  StoreVerifyReport report_;
  std::vector<SnapshotEntry> snapshots_;
  std::map<layout::ImageId, Needed> packs_;
  std::map<layout::ImageId, PackState> bad_;
  FrameDecoder decoder_;
  std::vector<std::byte> buffer_;
};

Status StoreVerifier::read_manifests(Where where) {
  SnapshotList list = VMSNAP_TRY(list_snapshots(store_, where));
  for (const Error& error : list.unreadable) report_.damage.push_back(error.message());
  for (SnapshotEntry& entry : list.snapshots) {
    const auto manifest = store_.open_manifest(entry.path);
    if (!manifest && manifest.error().os_errno() == ENOENT) continue;
    const auto rows = manifest ? manifest->read_packs()
                               : tl::unexpected<Error>(manifest.error());
    if (!rows) {
      report_.damage.push_back(rows.error().message());
      continue;
    }
    check_tree(*manifest, entry);
    for (const layout::PackRow& row : *rows) {
      if (row.referenced == 0) continue;
      const auto [found, added] = packs_.try_emplace(row.id, Needed{.row = row});
      if (!added && std::memcmp(&found->second.row.digest, &row.digest, sizeof row.digest) != 0) {
        report_.damage.push_back(
            fmt::format("{}: it expects another pack {} than other snapshots do", entry.path,
                        id_text(row.id)));
      }
    }
    snapshots_.push_back(std::move(entry));
    VMSNAP_CHECK(check_interrupted());
  }
  return {};
}

// Every block, by its parent's checksum, and the sections.
void StoreVerifier::check_tree(const ImageFile& manifest, const SnapshotEntry& entry) {
  const Status visited = visit_entries(manifest, [](uint64_t, uint64_t) { return Status(); });
  const auto state = manifest.read_section(layout::SectionType::device_state);
  const auto set = manifest.read_working_set();
  for (const Error* error : {visited ? nullptr : &visited.error(), state ? nullptr : &state.error(),
                             set ? nullptr : &set.error()}) {
    if (error) report_.damage.push_back(fmt::format("snapshot {}: {}", entry.id, error->message()));
  }
}

// Not to be believed, and not needed: what is not in it comes first.
void StoreVerifier::read_state() {
  const auto text = read_small_file(store_.paths().verified(), 256 << 20);
  const auto document =
      text ? nlohmann::json::parse(*text, nullptr, false) : nlohmann::json::object();
  for (auto& [id, needed] : packs_) {
    const auto found = document.is_object() ? document.find(id_text(id)) : document.end();
    if (document.is_object() && found != document.end() && found->is_number_unsigned()) {
      needed.checked_unix_ms = found->get<int64_t>();
    }
  }
}

void StoreVerifier::write_state() const {
  nlohmann::json document = nlohmann::json::object();
  for (const auto& [id, needed] : packs_) {
    if (needed.checked_unix_ms != 0) document[id_text(id)] = needed.checked_unix_ms;
  }
  // A store that is full, or can only be read, is verified all the same.
  if (const auto written = write_small_file(store_.paths().verified(), document.dump()); !written) {
    log_warning("which packs were checked when is not kept: {}", written.error().message());
  }
}

Status StoreVerifier::check_packs() {
  std::vector<Needed*> order;
  for (auto& [id, needed] : packs_) {
    needed.bytes = needed.row.frames_end;
    report_.bytes_total += needed.bytes;
    order.push_back(&needed);
  }
  report_.packs_total = order.size();
  std::ranges::sort(order, {}, [](const Needed* n) { return n->checked_unix_ms; });
  const double wanted = options_.sample * static_cast<double>(report_.bytes_total);
  for (Needed* needed : order) {
    if (static_cast<double>(report_.bytes_checked) >= wanted) break;
    if (const Status go_on = check_interrupted(); !go_on) {
      write_state();
      return go_on;
    }
    PackState state;
    const size_t found = report_.damage.size();
    const Status checked = check_pack(*needed, state);
    if (!checked) {
      report_.damage.push_back(checked.error().message());
      state.whole = false;
    }
    if (report_.damage.size() > found) bad_[needed->row.id] = std::move(state);
    needed->checked_unix_ms = options_.now_unix_ms;
    ++report_.packs_checked;
    report_.bytes_checked += needed->bytes;
    if (progress_ && wanted > 0) {
      progress_(static_cast<int>(
          std::min(100.0, 100.0 * static_cast<double>(report_.bytes_checked) / wanted)));
    }
  }
  write_state();
  return {};
}

Status StoreVerifier::check_pack(const Needed& needed, PackState& state) {
  const layout::ImageId& id = needed.row.id;
  const auto pack = VMSNAP_TRY(
      PackFile::open(VMSNAP_TRY(store_.paths().find_pack(id)), id, store_.master()));
  const FrameSource source = pack->frames(needed.row.frames_end);
  const auto trailer = pack->trailer();
  if (!trailer || pack_digest(*trailer) != needed.row.digest) {
    // Its frames may be there all the same: their checksums tell.
    report_.damage.push_back(trailer ? damage(pack->path(), "it is not the pack that snapshots expect").message()
                                     : trailer.error().message());
    if (!trailer) return {};
  }
  const auto segments = pack->segments(*trailer);
  if (!segments) {
    report_.damage.push_back(segments.error().message());
    return {};
  }
  if (const auto table = pack->frame_table(*trailer); !table) {
    report_.damage.push_back(table.error().message());
  }
  for (const layout::PackSegment& segment : *segments) {
    VMSNAP_CHECK(check_segment(*pack, segment, source, state));
  }
  return {};
}

Status StoreVerifier::check_segment(const PackFile& pack, const layout::PackSegment& segment,
                                    const FrameSource& source, PackState& state) {
  buffer_.resize(segment.length);
  VMSNAP_CHECK(read_exact_at(source.fd, buffer_, segment.offset, pack.path()));
  if (digest(buffer_) == segment.digest) return {};
  report_.damage.push_back(
      damage(pack.path(), "the digest of bytes {} to {} does not match", segment.offset,
             segment.offset + segment.length).message());
  // Which frames of it?
  for (uint64_t at = 0; at < segment.length;) {
    layout::FrameHeader header;
    const uint64_t left = segment.length - at;
    if (left < sizeof header) break;
    std::memcpy(&header, buffer_.data() + at, sizeof header);
    if (!FrameDecoder::plausible(header, pack.sealed()) ||
        sizeof header + header.stored_length > left) {
      // From here on nothing can be told apart.
      state.lost.insert(segment.offset + at);
      state.whole = false;
      return {};
    }
    const auto payload =
        std::span<const std::byte>(buffer_).subspan(at + sizeof header, header.stored_length);
    if (!decoder_.intact(header, payload, {.offset = segment.offset + at, .seed = source.seed})) {
      state.lost.insert(segment.offset + at);
    }
    at += layout::align_up(sizeof header + header.stored_length, layout::frame_alignment);
  }
  return {};
}

// Reads the pages of bad packs as a restore would.
void StoreVerifier::find_lost_pages() {
  for (const SnapshotEntry& entry : snapshots_) {
    const auto manifest = store_.open_manifest(entry.path);
    const auto rows = manifest ? manifest->read_packs() : tl::unexpected<Error>(manifest.error());
    if (!rows) continue;
    const auto is_bad = [&](const layout::PackRow& row) { return bad_.contains(row.id); };
    if (std::ranges::none_of(*rows, is_bad)) continue;
    PackSet packs(store_.paths(), store_.master());
    packs.add_rows(*rows);
    (void)visit_entries(*manifest, [&](uint64_t page, uint64_t bits) -> Status {
      const uint64_t pack = PageEntry::from_bits(bits).pack;
      std::array<std::byte, page_size> bytes;
      const bool bad = pack == 0 || pack > rows->size() || is_bad((*rows)[pack - 1]);
      if (bad && !read_stored_page(packs, bits, bytes)) add_lost(entry, page);
      return {};
    });
  }
}

void StoreVerifier::add_lost(const SnapshotEntry& entry, uint64_t page) {
  ++report_.lost_pages;
  const Region& region = *find_region(entry.info.regions, page);
  const uint64_t offset = (page - region.first_page) * page_size;
  if (!report_.lost.empty()) {
    auto& last = report_.lost.back();
    if (last.id == entry.id && last.region == region.name &&
        last.offset + last.page_count * page_size == offset) {
      ++last.page_count;
      return;
    }
  }
  if (report_.lost.size() == StoreVerifyReport::max_listed) return;
  report_.lost.push_back({entry.id, entry.vm(), region.name, offset, 1});
}

Result<StoreVerifyReport> StoreVerifier::run() {
  VMSNAP_CHECK(read_manifests(Where::snapshots));
  VMSNAP_CHECK(read_manifests(Where::trash));
  report_.snapshots = snapshots_.size();
  read_state();
  VMSNAP_CHECK(check_packs());
  if (!bad_.empty()) find_lost_pages();
  for (const auto& [id, state] : bad_) report_.bad_packs.push_back(id);
  return std::move(report_);
}

}  // namespace

Status StoreVerifyReport::status(const StorePaths& paths) const {
  if (ok()) return {};
  const std::string what =
      lost_pages != 0 ? fmt::format("{} pages of its snapshots cannot be read back", lost_pages)
                      : damage.front();
  return tl::unexpected(
      Error(ErrorCode::damaged, fmt::format("the store {} is damaged: {}", paths.root, what))
          .with_remedy("'vmsnap repair --store " + paths.root +
                       "' keeps new snapshots from using what is damaged."));
}

Result<StoreVerifyReport> verify_store(const Store& store, const StoreVerifyOptions& options,
                                       const std::function<void(int)>& progress) {
  return StoreVerifier(store, options, progress).run();
}

}  // namespace vmsnap
