#include "formats/store/repack.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <unordered_map>

#include "formats/append_file.h"
#include "formats/descriptor_limit.h"
#include "formats/file.h"
#include "formats/frame_batch.h"
#include "formats/image_tail.h"
#include "formats/image_writer.h"
#include "formats/interrupt.h"
#include "formats/log.h"
#include "formats/page_array.h"
#include "formats/page_entry.h"
#include "formats/sealed_file.h"
#include "formats/store/content_index.h"
#include "formats/store/manifest.h"
#include "formats/store/pack_sink.h"
#include "formats/store/sparse_packs.h"
#include "formats/test_point.h"

namespace vmsnap {

namespace {

// The snapshots of one domain, which share no pack with those of others.
class DomainRepack {
 public:
  DomainRepack(const Store& store, std::string domain, SparsePacks packs,
               uint64_t pack_bytes)
      : store_(store),
        domain_(std::move(domain)),
        old_(std::move(packs)),
        options_{.deltas = std::ranges::any_of(
                     old_, [](const auto& pack) { return pack.second.deltas; })},
        new_(store.paths(), store.master()),
        sink_(store.paths(), new_, pack_bytes, options_.deltas, store.master()) {}

  Status run(RepackReport& report);

 private:
  // One manifest that refers to what is moved.
  struct Manifest {
    std::string path;
    AtomicFile file;  // its successor
  };
  // Where a page was: its pack, and its entry without the pack's number.
  using Moved = std::map<layout::ImageId, std::unordered_map<uint64_t, uint64_t>>;

  Status move_frames(const std::string& path);
  Status add(uint64_t old_key, std::unordered_map<uint64_t, uint64_t>& moved,
             std::span<const std::byte, page_size> page);
  Status flush();
  Status leave(const layout::ImageId& id, const Error& error);
  Status rewrite(const std::string& path);
  Status publish(RepackReport& report);
  void add_to_index() const;

  const Store& store_;
  const std::string domain_;
  SparsePacks old_;
  const ImageWriterOptions options_;  // what the new packs are like
  PackSet new_;
  PackSink sink_;
  Moved moved_;

  // Pages on their way to the sink, and who is to know their place.
  static constexpr size_t batch_pages = 64;
  FrameBatch frames_;
  std::unique_ptr<SimilarPages> similar_;
  std::vector<std::byte> bytes_;
  std::vector<FrameBatch::Page> pages_;
  std::vector<uint64_t*> waiting_;

  std::vector<Manifest> manifests_;
};

void count(const SparsePack& pack, RepackReport& report) {
  ++report.packs;
  report.bytes += pack.bytes;
  report.needed_bytes += pack.frames ? pack.bytes * pack.needed / pack.frames : 0;
}

// An entry without the number of its pack.
uint64_t key_of(PageEntry entry) {
  entry.pack = 0;
  return entry.pack_bits();
}

Status DomainRepack::add(uint64_t old_key, std::unordered_map<uint64_t, uint64_t>& moved,
                         std::span<const std::byte, page_size> page) {
  const auto [place, is_new] = moved.try_emplace(old_key, 0);
  if (!is_new) return {};
  bytes_.resize(batch_pages * page_size);
  const auto held = std::span(bytes_).subspan(waiting_.size() * page_size).first<page_size>();
  std::ranges::copy(page, held.begin());
  pages_.push_back({.bytes = held, .hash = store_.page_hash(page)});
  waiting_.push_back(&place->second);
  return waiting_.size() < batch_pages ? Status() : flush();
}

Status DomainRepack::flush() {
  VMSNAP_TRY(frames_.write(sink_, options_.zstd_level(), similar_.get(), pages_));
  for (size_t k = 0; k < waiting_.size(); ++k) *waiting_[k] = pages_[k].entry;
  waiting_.clear();
  pages_.clear();
  return check_interrupted();
}

// A pack that cannot be read is none of those that are moved: what was copied
// of it already is not used.
Status DomainRepack::leave(const layout::ImageId& id, const Error& error) {
  VMSNAP_CHECK(flush());  // who waits for his place may be one of it
  log_warning("{}; its pack is not repacked: run 'vmsnap verify --store {}', and 'vmsnap repair'",
              error.message(), store_.paths().root);
  old_.erase(id);
  moved_.erase(id);
  return {};
}

// In the order of the pages of one snapshot after another: neighbours stay near.
Status DomainRepack::move_frames(const std::string& path) {
  const auto opened = store_.open_manifest(path);
  if (!opened && opened.error().os_errno() == ENOENT) return {};  // removed meanwhile
  if (!opened) return tl::unexpected(opened.error());
  const ImageFile& manifest = *opened;
  const std::vector<layout::PackRow> rows = VMSNAP_TRY(manifest.read_packs());
  PackSet files(store_.paths(), store_.master());
  files.add_rows(rows);
  return visit_entries(manifest, [&](uint64_t, uint64_t bits) -> Status {
    const PageEntry entry = PageEntry::from_bits(bits);
    if (entry.pack == 0 || entry.pack > rows.size() || !old_.contains(rows[entry.pack - 1].id)) return {};
    auto& moved = moved_[rows[entry.pack - 1].id];
    if (moved.contains(key_of(entry))) return {};
    std::array<std::byte, page_size> page;
    if (const Status read = read_stored_page(files, bits, page); !read) {
      return leave(rows[entry.pack - 1].id, read.error());
    }
    return add(key_of(entry), moved, page);
  });
}

Status DomainRepack::rewrite(const std::string& path) {
  const auto opened = store_.open_manifest(path);
  if (!opened && opened.error().os_errno() == ENOENT) return {};
  if (!opened) return tl::unexpected(opened.error());
  const ImageFile& manifest = *opened;
  const std::vector<layout::PackRow> rows = VMSNAP_TRY(manifest.read_packs());
  const bool concerned = std::ranges::any_of(rows, [&](const layout::PackRow& row) {
    return row.referenced > 0 && old_.contains(row.id);
  });
  if (!concerned) return {};

  // Its packs that stay and those that it needs of the new ones, numbered anew.
  std::vector<layout::PackRow> successors;
  std::vector<uint64_t> of_old(rows.size() + 1, 0), of_new(new_.size() + 1, 0);
  const auto number_of = [&](uint64_t& number, const layout::PackRow& row) {
    if (number == 0) {
      successors.push_back(row);
      successors.back().referenced = 0;
      number = successors.size();
    }
    ++successors[number - 1].referenced;
    return number;
  };
  PageArray pages = VMSNAP_TRY(PageArray::create(manifest.trailer().page_count));
  const Status renumbered = visit_entries(manifest, [&](uint64_t page, uint64_t bits) -> Status {
    PageEntry entry = PageEntry::from_bits(bits);
    if (entry.pack == 0 || entry.pack > rows.size()) {
      return fail(ErrorCode::damaged, "{} refers to a pack that it does not list", path);
    }
    const layout::PackRow& row = rows[entry.pack - 1];
    if (old_.contains(row.id)) {
      // Removed when frames were moved, and taken back since: it stays as it is.
      const auto& moved = moved_[row.id];
      const auto place = moved.find(key_of(entry));
      if (place == moved.end()) return fail(ErrorCode::locked, "{} came back meanwhile", path);
      entry = PageEntry::from_bits(place->second);
      entry.pack = number_of(of_new[entry.pack], new_.row(entry.pack));
    } else {
      entry.pack = number_of(of_old[entry.pack], row);
    }
    pages.set(page, entry.pack_bits());
    return {};
  });
  if (!renumbered && renumbered.error().code() == ErrorCode::locked) return {};
  VMSNAP_CHECK(renumbered);
  if (successors.size() > layout::max_pack_number) return {};  // stays as it is

  AtomicFile file = VMSNAP_TRY(AtomicFile::create_in(store_.paths().temporary(), path, /*replace=*/true));
  std::unique_ptr<ByteSink> out;
  if (store_.master()) {
    out = std::make_unique<SealedWriter>(file.fd(), file.path(), *store_.master());
  } else {
    out = std::make_unique<AppendFile>(file.fd(), file.path(), 0);
  }
  const layout::ImageId id = manifest.header().id;
  VMSNAP_CHECK(append_empty_frames(*out, id));
  const ImageTail tail = {.id = id,
                          .pages = pages,
                          .counts = {.duplicate = manifest.trailer().duplicate_pages,
                                     .stored = manifest.trailer().stored_pages},
                          .page_count = manifest.trailer().page_count,
                          .frames_end = out->offset()};
  const auto state = VMSNAP_TRY(manifest.read_section(layout::SectionType::device_state));
  const auto working_set = VMSNAP_TRY(manifest.read_working_set());
  const ImageSections sections = {.device_state = state,
                                  .packs = std::as_bytes(std::span(successors)),
                                  .working_set = working_set};
  VMSNAP_TRY(write_tail(*out, tail, VMSNAP_TRY(manifest.read_info()), sections, path));
  VMSNAP_CHECK(out->finish());
  VMSNAP_CHECK(file.sync());
  manifests_.push_back({path, std::move(file)});
  return {};
}

Status DomainRepack::publish(RepackReport& report) {
  const StoreLock lock = VMSNAP_TRY(StoreLock::commit(store_.paths()));
  VMSNAP_CHECK(sink_.publish());
  VMSNAP_CHECK(sync_directory_of(store_.paths().packs() + "/."));
  VMSNAP_TEST_POINT("repack.packs_renamed");
  for (Manifest& manifest : manifests_) {
    // Removed meanwhile, or somebody began to restore it: it stays as it is, and
    // so do its packs.
    const Fd claim = claim_manifest(manifest.path);
    if (!claim) continue;
    VMSNAP_CHECK(manifest.file.publish());
    VMSNAP_TEST_POINT("repack.manifest_renamed");
    ++report.manifests;
  }
  return sync_directory_of(store_.paths().snapshots() + "/.");
}

// Without this, later snapshots find less.
void DomainRepack::add_to_index() const {
  const auto added = [&]() -> Status {
    const StoreLock lock = VMSNAP_TRY(StoreLock::index(store_.paths()));
    for (const PackSink::Finished& pack : sink_.finished()) {
      VMSNAP_CHECK(
          ContentIndex::add(store_.paths(), store_.index_name(domain_), pack.row.id, pack.frames));
    }
    return {};
  }();
  if (!added) log_warning("the index was not brought up to date: {}", added.error().message());
}

Status DomainRepack::run(RepackReport& report) {
  if (options_.deltas) similar_ = VMSNAP_TRY(SimilarPages::create(options_.similar_slots));
  std::vector<std::string> paths;
  for (const std::string& id : VMSNAP_TRY(manifest_ids(store_.paths().snapshots()))) {
    const std::string path = store_.paths().snapshot(id);
    const auto manifest = store_.open_manifest(path);
    if (!manifest && manifest.error().os_errno() == ENOENT) continue;
    if (!manifest) return tl::unexpected(manifest.error());
    if (VMSNAP_TRY(manifest->read_info()).domain == domain_) paths.push_back(path);
  }
  for (const std::string& path : paths) VMSNAP_CHECK(move_frames(path));
  VMSNAP_CHECK(flush());
  if (old_.empty()) return {};
  VMSNAP_TRY(sink_.close());
  VMSNAP_TEST_POINT("repack.packs_synced");
  for (const std::string& path : paths) {
    VMSNAP_CHECK(rewrite(path));
    VMSNAP_CHECK(check_interrupted());
  }
  VMSNAP_CHECK(publish(report));
  for (const auto& [id, pack] : old_) count(pack, report);
  add_to_index();
  return {};
}

}  // namespace

Status repack(const Store& store, const RepackOptions& options, RepackReport& report,
              const std::function<Status()>& free_dead_packs) {
  SparsePackFinder finder = VMSNAP_TRY(SparsePackFinder::create(store, options));
  const MoreDescriptors one_for_each_manifest;
  for (;;) {
    SparsePacks batch = VMSNAP_TRY(finder.next());
    if (batch.empty()) return {};
    std::map<std::string, SparsePacks> domains;
    for (auto& [id, pack] : batch) {
      if (options.dry_run) count(pack, report);
      domains[pack.domain].emplace(id, std::move(pack));
    }
    if (options.dry_run) continue;
    for (auto& [domain, packs] : domains) {
      VMSNAP_CHECK(DomainRepack(store, domain, std::move(packs), options.pack_bytes).run(report));
    }
    VMSNAP_CHECK(free_dead_packs());
  }
}

}  // namespace vmsnap
