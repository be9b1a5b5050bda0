#include "formats/page_store.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "formats/checksum.h"
#include "formats/page_entry.h"

namespace vmsnap {

namespace {

using Page = std::span<const std::byte, page_size>;

constexpr uint32_t settled = UINT32_MAX;  // instead of a leader: the entry is known
constexpr uint32_t looked_at_in_a_turn = 8;

Page page_at(std::span<const std::byte> pages, size_t k) {
  return Page(pages.data() + k * page_size, page_size);
}

bool same_bytes(Page a, Page b) { return std::memcmp(a.data(), b.data(), page_size) == 0; }

// Its first word is zero, and every word equals the one before it.
bool is_zero(Page page) {
  constexpr size_t word = sizeof(uint64_t);
  uint64_t first;
  std::memcpy(&first, page.data(), word);
  return first == 0 && std::memcmp(page.data(), page.data() + word, page_size - word) == 0;
}

}  // namespace

// The claims of one batch. Whatever way the batch ends, none is left behind:
// others may be waiting for it.
class PageStore::Claims {
 public:
  Claims(HintTable& hints, HintTable::Owner owner) : hints_(hints), owner_(owner) {}
  ~Claims() { publish({}); }
  Claims(const Claims&) = delete;
  Claims& operator=(const Claims&) = delete;

  void add(uint64_t hash, uint32_t page) { claims_.emplace_back(hash, page); }

  // entries[k] is the frame of page k; without entries, withdraws.
  void publish(std::span<const uint64_t> entries) {
    for (const auto& [hash, page] : claims_) {
      hints_.publish(hash, owner_, entries.empty() ? 0 : entries[page]);
    }
    claims_.clear();
  }

 private:
  HintTable& hints_;
  const HintTable::Owner owner_;
  std::vector<std::pair<uint64_t, uint32_t>> claims_;
};

PageStore::PageStore(FrameSink& sink, KnownPages* known, std::string name,
                     ImageWriterOptions options)
    : sink_(sink), known_(known), name_(std::move(name)), options_(std::move(options)) {}

Result<std::unique_ptr<PageStore>> PageStore::create(FrameSink& sink, KnownPages* known,
                                                     std::string name, ImageWriterOptions options) {
  if (!options.hash) options.hash = [](auto bytes) { return checksum(bytes, 0); };
  std::unique_ptr<PageStore> store(
      new PageStore(sink, known, std::move(name), std::move(options)));
  store->hints_ = VMSNAP_TRY(HintTable::create(store->options_.hint_entries));
  if (store->options_.deltas) {
    store->similar_ = VMSNAP_TRY(SimilarPages::create(store->options_.similar_slots));
  }
  return store;
}

Result<PageCounts> PageStore::store(Scratch& scratch, std::span<const uint64_t> numbers,
                                    std::span<const std::byte> pages, std::span<uint64_t> entries) {
  auto counts = store_batch(scratch, numbers, pages, entries);
  if (!counts) failed_ = true;
  return counts;
}

Status PageStore::status() const {
  if (failed_) return fail(ErrorCode::io, "{} is incomplete: an earlier write failed", name_);
  return {};
}

bool PageStore::may_share(uint64_t number, uint64_t entry) const {
  return !known_ || known_->may_share(number, entry);
}

Result<PageCounts> PageStore::store_batch(Scratch& scratch, std::span<const uint64_t> numbers,
                                          std::span<const std::byte> pages,
                                          std::span<uint64_t> entries) {
  const size_t count = entries.size();
  scratch.hashes.resize(count);
  scratch.leaders.resize(count);
  scratch.by_hash.clear();
  PageCounts counts;
  // Of pages that are alike one after the other only the first is hashed.
  std::optional<uint32_t> hashed;
  for (uint32_t k = 0; k < count; ++k) {
    if (k % looked_at_in_a_turn == 0) scratch.between_pages();
    const Page page = page_at(pages, k);
    scratch.leaders[k] = settled;
    entries[k] = 0;
    if (is_zero(page)) {
      ++counts.zero;
      continue;
    }
    if (known_) {
      scratch.between_pages();
      entries[k] = known_->same_place(numbers[k], page);
      if (entries[k] != 0) continue;
    }
    if (hashed && same_bytes(page_at(pages, *hashed), page)) {
      scratch.hashes[k] = scratch.hashes[*hashed];
      scratch.leaders[k] = *hashed;
    } else {
      scratch.hashes[k] = options_.hash(page);
      scratch.by_hash.emplace_back(scratch.hashes[k], k);
      hashed = k;
    }
  }
  find_leaders(scratch, pages);

  scratch.pending.clear();
  for (uint32_t k = 0; k < count; ++k) {
    if (scratch.leaders[k] == k) scratch.pending.push_back(k);
  }
  const HintTable::Owner owner = next_owner_.fetch_add(1, std::memory_order_relaxed);
  Claims claims(*hints_, owner);
  while (!scratch.pending.empty()) {
    scratch.to_store.clear();
    scratch.waiting.clear();
    for (const uint32_t k : scratch.pending) {
      scratch.between_pages();
      const uint64_t hash = scratch.hashes[k];
      switch (VMSNAP_TRY(look_up(hash, owner, numbers[k], page_at(pages, k), entries[k]))) {
        case HintTable::Answer::compare: break;  // equal: entries[k] is set
        case HintTable::Answer::wait: scratch.waiting.push_back(k); break;
        case HintTable::Answer::claimed:
          claims.add(hash, k);
          if (known_) entries[k] = known_->same_content(hash, numbers[k], page_at(pages, k));
          if (entries[k] == 0) scratch.to_store.push_back(k);
          break;
        case HintTable::Answer::unlisted: scratch.to_store.push_back(k); break;
      }
    }
    counts.bytes += VMSNAP_TRY(write_frames(scratch, pages, entries));
    counts.stored += scratch.to_store.size();
    claims.publish(entries);
    // Only now, with nobody left who could be waiting for us.
    if (!scratch.waiting.empty()) hints_->wait(scratch.hashes[scratch.waiting.front()], owner);
    std::swap(scratch.pending, scratch.waiting);
  }

  scratch.to_store.clear();
  for (uint32_t k = 0; k < count; ++k) {
    const uint32_t leader = scratch.leaders[k];
    if (leader == settled || leader == k) continue;
    entries[k] = entries[leader];  // the leader's own leader has come before
    if (!may_share(numbers[k], entries[k])) scratch.to_store.push_back(k);
  }
  counts.bytes += VMSNAP_TRY(write_frames(scratch, pages, entries));
  counts.stored += scratch.to_store.size();
  counts.duplicate = count - counts.zero - counts.stored;
  return counts;
}

void PageStore::find_leaders(Scratch& scratch, std::span<const std::byte> pages) const {
  constexpr size_t max_compared = 8;  // different pages of one hash: an attack, or a test
  std::ranges::sort(scratch.by_hash);
  std::array<uint32_t, max_compared> leaders;
  size_t leader_count = 0;
  for (size_t i = 0; i < scratch.by_hash.size(); ++i) {
    const uint64_t hash = scratch.by_hash[i].first;
    const uint32_t k = scratch.by_hash[i].second;
    if (i == 0 || hash != scratch.by_hash[i - 1].first) leader_count = 0;
    const auto end = leaders.begin() + leader_count;
    const auto found = std::find_if(leaders.begin(), end, [&](uint32_t leader) {
      return same_bytes(page_at(pages, leader), page_at(pages, k));
    });
    scratch.leaders[k] = found != end ? *found : k;
    if (found == end && leader_count < max_compared) leaders[leader_count++] = k;
  }
}

// As HintTable::ask(), but `compare` means: compared, equal, `entry` is set.
Result<HintTable::Answer> PageStore::look_up(uint64_t hash, HintTable::Owner owner, uint64_t number,
                                             Page page, uint64_t& entry) {
  std::array<std::byte, page_size> stored;
  std::vector<uint64_t> rejected;
  for (;;) {
    uint64_t candidate = 0;
    const HintTable::Answer answer = hints_->ask(hash, owner, rejected, candidate);
    if (answer != HintTable::Answer::compare) return answer;
    if (may_share(number, candidate)) {
      VMSNAP_CHECK(sink_.read(candidate, stored));
      if (same_bytes(page, stored)) {
        entry = candidate;
        return answer;
      }
    }
    rejected.push_back(candidate);
  }
}

// Returns how many bytes they take.
Result<uint64_t> PageStore::write_frames(Scratch& scratch, std::span<const std::byte> pages,
                                         std::span<uint64_t> entries) {
  scratch.written.clear();
  for (const uint32_t k : scratch.to_store) {
    scratch.written.push_back({.bytes = page_at(pages, k), .hash = scratch.hashes[k]});
  }
  const uint64_t used = VMSNAP_TRY(
      scratch.frames.write(sink_, options_.zstd_level(), similar_.get(), scratch.written,
                           scratch.between_pages));
  for (size_t i = 0; i < scratch.to_store.size(); ++i) {
    entries[scratch.to_store[i]] = scratch.written[i].entry;
  }
  return used;
}

}  // namespace vmsnap
