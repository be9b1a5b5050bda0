#include "formats/hint_table.h"

#include <algorithm>
#include <bit>

namespace vmsnap {

namespace {

constexpr uint64_t claim_kind = uint64_t{15} << 60;

bool is_claim(uint64_t value) { return value >> 60 == 15; }
uint64_t claim_of(HintTable::Owner owner) { return claim_kind | owner; }

}  // namespace

Result<std::unique_ptr<HintTable>> HintTable::create(size_t entries) {
  // No fewer sets than stripes, or two stripes would guard one set.
  const size_t sets = std::bit_ceil(std::max(entries / ways, stripe_count));
  std::unique_ptr<HintTable> table(new HintTable);
  table->sets_ = VMSNAP_TRY(SparseArray<Set>::create(sets, Touched::all_over));
  return table;
}

HintTable::Answer HintTable::ask(uint64_t hash, Owner owner, std::span<const uint64_t> rejected,
                                 uint64_t& candidate) {
  std::lock_guard lock(stripe_of(hash).mutex);
  Set& set = set_of(hash);
  bool claimed_by_owner = false;
  bool claimed_by_other = false;
  for (size_t way = 0; way < ways; ++way) {
    const Hint hint = set[way];
    if (hint.value == 0 || hint.hash != hash) continue;
    if (is_claim(hint.value)) {
      (hint.value == claim_of(owner) ? claimed_by_owner : claimed_by_other) = true;
    } else if (std::ranges::find(rejected, hint.value) == rejected.end()) {
      candidate = hint.value;
      std::rotate(set.begin(), set.begin() + way, set.begin() + way + 1);
      return Answer::compare;
    }
  }
  if (claimed_by_other) return Answer::wait;
  // As many collisions as a set can hold: an attack, or a test. Stop looking.
  if (claimed_by_owner || rejected.size() >= ways) return Answer::unlisted;

  // The least recently used way that is not a claim makes room.
  for (size_t way = ways; way-- > 0;) {
    if (is_claim(set[way].value)) continue;
    std::rotate(set.begin(), set.begin() + way, set.begin() + way + 1);
    set[0] = {.hash = hash, .value = claim_of(owner)};
    return Answer::claimed;
  }
  return Answer::unlisted;
}

void HintTable::publish(uint64_t hash, Owner owner, uint64_t entry) {
  Stripe& stripe = stripe_of(hash);
  std::lock_guard lock(stripe.mutex);
  for (Hint& hint : set_of(hash)) {
    if (hint.hash == hash && hint.value == claim_of(owner)) hint.value = entry;
  }
  if (stripe.waiting > 0) stripe.published.notify_all();
}

void HintTable::wait(uint64_t hash, Owner owner) {
  Stripe& stripe = stripe_of(hash);
  std::unique_lock lock(stripe.mutex);
  ++stripe.waiting;
  stripe.published.wait(lock, [&] {
    return std::ranges::none_of(set_of(hash), [&](const Hint& hint) {
      return hint.hash == hash && is_claim(hint.value) && hint.value != claim_of(owner);
    });
  });
  --stripe.waiting;
}

}  // namespace vmsnap
