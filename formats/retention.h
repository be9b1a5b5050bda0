// Which snapshots to keep: the policy of restic's forget command.
//
// The rules are those of restic (restic-forget(1), and "Removing snapshots
// according to a policy" in its documentation):
//
// - They hold for each VM by itself, and each by itself: a snapshot is kept if
//   any rule keeps it.
// - last = n keeps the n newest. hourly = n goes through the hours that have a
//   snapshot, newest first, and keeps the newest one of each of the first n;
//   daily, weekly (ISO 8601: from Monday), monthly and yearly likewise.
// - If such a rule runs out of snapshots before it has found n, it keeps the
//   oldest one as well.
// - within keeps what is newer than that before the VM's newest snapshot
//   (subtract() in duration.h).
// - A tag list keeps the snapshots that have all of its tags; the empty list
//   those that have none, but for the one that `vmsnap backup` gives.
// - Snapshots dated after `now` are kept, and count for nothing.
//
// Hours, days, weeks, months and years are those of the local time zone
// (localtime_r(3), environment variable TZ), by the clock on the wall: the hour
// that comes twice when summer time ends is one hour.
//
// Pure functions, no files and no clock; any thread may call them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/duration.h"
#include "formats/error.h"

namespace CLI {
class App;
}

namespace vmsnap {

using TagList = std::vector<std::string>;

struct KeepRule {
  static constexpr int unlimited = -1;

  // How many; 0 for none, `unlimited` for all.
  int last = 0, hourly = 0, daily = 0, weekly = 0, monthly = 0, yearly = 0;
  std::optional<CalendarDuration> within = {};
  std::vector<TagList> keep_tags = {};
};

struct RetentionItem {
  std::string id;
  std::string vm;
  int64_t created_unix_ms = 0;
  std::vector<std::string> tags;
};

struct RetentionDecision {
  bool keep = false;
  // Why it is kept: "last snapshot", "daily snapshot", "oldest daily snapshot",
  // "within 7d", "tag nightly", "no tags", "in the future". Empty if it is not.
  std::vector<std::string> reasons;
};

// Refuses a rule that keeps nothing (ErrorCode::usage): it would remove every
// snapshot.
Status check_keep_rule(const KeepRule& rule);

// One decision for each of `items`, in their order, which does not matter
// otherwise; of snapshots with the same time, that with the greater id counts
// as the newer. ErrorCode::usage if the rule keeps nothing, and if it would
// remove every snapshot of a VM, as tags alone can.
Result<std::vector<RetentionDecision>> apply_keep_rule(std::span<const RetentionItem> items,
                                                       const KeepRule& rule, int64_t now_unix_ms);

// "7" or "unlimited".
Result<int> parse_keep_count(std::string_view text);

// "a,b" is the snapshots that have both tags; "" those that have none.
TagList parse_tag_list(std::string_view text);

// --keep-last N, --keep-hourly N, --keep-daily N, --keep-weekly N,
// --keep-monthly N, --keep-yearly N, --keep-within DURATION, --keep-tag TAG,
// all into `rule`, which has to live until `app` has parsed.
void add_keep_options(CLI::App& app, KeepRule& rule);

}  // namespace vmsnap
