#include "formats/retention.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <ctime>
#include <map>
#include <tuple>

#include "formats/image_info.h"

namespace vmsnap {

namespace {

constexpr int largest_keep_count = 1'000'000'000;

// Numbers for the hour, day, week, month and year that a moment is in.
// Different for neighbours in time is all that is asked of them.
struct Buckets {
  int64_t hour = 0, day = 0, week = 0, month = 0, year = 0;
};

Buckets buckets_of(int64_t unix_ms) {
  using namespace std::chrono;
  const std::time_t seconds = floor<std::chrono::seconds>(milliseconds(unix_ms)).count();
  std::tm local = {};
  ::localtime_r(&seconds, &local);
  const sys_days day = year(local.tm_year + 1900) / (local.tm_mon + 1) / local.tm_mday;
  Buckets in;
  in.year = local.tm_year;
  in.month = in.year * 12 + local.tm_mon;
  in.day = day.time_since_epoch().count();
  in.hour = in.day * 24 + local.tm_hour;
  in.week = floor<weeks>(day.time_since_epoch() + days(3)).count();  // 1970 began on a Thursday
  return in;
}

// One rule that counts, while it goes through the snapshots of a VM.
struct Counter {
  int left;  // KeepRule::unlimited never ends
  const char* name;
  int64_t Buckets::* bucket;  // null: each snapshot is one of its own
  std::optional<int64_t> previous = {};

  // Newest first; adds to `reasons` if this one is kept.
  void visit(const Buckets& in, bool oldest, std::vector<std::string>& reasons) {
    if (left == 0) return;
    const bool is_new = !bucket || previous != in.*bucket;
    if (!is_new && !oldest) return;
    if (bucket) previous = in.*bucket;
    if (left > 0) --left;
    reasons.push_back(fmt::format("{}{} snapshot", is_new ? "" : "oldest ", name));
  }
};

bool has_tags(const RetentionItem& item, const TagList& wanted) {
  if (wanted.empty()) return std::ranges::all_of(item.tags, is_backup_tag);  // no word of a user's
  return std::all_of(wanted.begin(), wanted.end(), [&](const std::string& tag) {
    return std::find(item.tags.begin(), item.tags.end(), tag) != item.tags.end();
  });
}

// `newest_first`: indices of one VM's snapshots, none of them in the future.
void decide_for_vm(std::span<const RetentionItem> items, std::span<const size_t> newest_first,
                   const KeepRule& rule, std::vector<RetentionDecision>& decisions) {
  std::array<Counter, 6> counters = {{{rule.last, "last", nullptr},
                                      {rule.hourly, "hourly", &Buckets::hour},
                                      {rule.daily, "daily", &Buckets::day},
                                      {rule.weekly, "weekly", &Buckets::week},
                                      {rule.monthly, "monthly", &Buckets::month},
                                      {rule.yearly, "yearly", &Buckets::year}}};
  for (const size_t index : newest_first) {
    const RetentionItem& item = items[index];
    std::vector<std::string>& reasons = decisions[index].reasons;
    const Buckets in = buckets_of(item.created_unix_ms);
    for (Counter& counter : counters) counter.visit(in, index == newest_first.back(), reasons);
    if (rule.within) {
      const int64_t newest = items[newest_first.front()].created_unix_ms;
      if (item.created_unix_ms > subtract(newest, *rule.within)) {
        reasons.push_back("within " + to_string(*rule.within));
      }
    }
    for (const TagList& tags : rule.keep_tags) {
      if (!has_tags(item, tags)) continue;
      reasons.push_back(tags.empty() ? "no tags" : fmt::format("tag {}", fmt::join(tags, ",")));
    }
  }
}

}  // namespace

Status check_keep_rule(const KeepRule& rule) {
  const bool counts =
      rule.last || rule.hourly || rule.daily || rule.weekly || rule.monthly || rule.yearly;
  if (counts || rule.within || !rule.keep_tags.empty()) return {};
  return tl::unexpected(
      Error(ErrorCode::usage, "a rule that keeps nothing would remove every snapshot")
          .with_remedy("Say what to keep, for instance the last 7 days: --keep-daily 7, or "
                       "daily = 7 below [keep]."));
}

Result<std::vector<RetentionDecision>> apply_keep_rule(std::span<const RetentionItem> items,
                                                       const KeepRule& rule, int64_t now_unix_ms) {
  VMSNAP_CHECK(check_keep_rule(rule));
  std::vector<RetentionDecision> decisions(items.size());
  std::map<std::string_view, std::vector<size_t>> vms;
  for (size_t i = 0; i < items.size(); ++i) vms[items[i].vm].push_back(i);

  for (auto& [vm, indices] : vms) {
    std::sort(indices.begin(), indices.end(), [&](size_t a, size_t b) {
      return std::tie(items[a].created_unix_ms, items[a].id) >
             std::tie(items[b].created_unix_ms, items[b].id);
    });
    const auto past = std::find_if(indices.begin(), indices.end(), [&](size_t index) {
      return items[index].created_unix_ms <= now_unix_ms;
    });
    std::for_each(indices.begin(), past,
                  [&](size_t index) { decisions[index].reasons = {"in the future"}; });
    decide_for_vm(items, std::span(past, indices.end()), rule, decisions);

    bool any = false;
    for (const size_t index : indices) {
      decisions[index].keep = !decisions[index].reasons.empty();
      any |= decisions[index].keep;
    }
    if (!any) {
      return tl::unexpected(
          Error(ErrorCode::usage,
                fmt::format("this rule would remove every snapshot of the VM '{}'", vm))
              .with_remedy("Add a rule that keeps some, for instance --keep-last 1, or last = 1 "
                           "below [keep]."));
    }
  }
  return decisions;
}

Result<int> parse_keep_count(std::string_view text) {
  if (text == "unlimited") return KeepRule::unlimited;
  int count = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), count);
  if (parsed.ec != std::errc() || parsed.ptr != text.data() + text.size() || count < 0 ||
      count > largest_keep_count) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("'{}' is not a number of snapshots", text.substr(0, 40)))
            .with_remedy("Give a number such as 7, or unlimited."));
  }
  return count;
}

TagList parse_tag_list(std::string_view text) {
  TagList tags;
  while (!text.empty()) {
    const size_t end = std::min(text.find(','), text.size());
    if (end > 0) tags.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return tags;
}

}  // namespace vmsnap
