#include "formats/duration.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <ctime>

namespace vmsnap {

namespace {

constexpr int64_t largest_clock_days = 36500;

// Reads "<number><unit>..." with each of `units` at most once, in order. False
// for anything else, for a number above `largest`, and when all are zero.
template <size_t count>
bool parse_units(std::string_view text, const std::array<char, count>& units, int64_t largest,
                 std::array<int64_t, count>& numbers) {
  numbers = {};
  size_t next = 0;
  while (!text.empty()) {
    int64_t number = 0;
    const auto parsed = std::from_chars(text.data(), text.data() + text.size(), number);
    if (parsed.ec != std::errc() || text.front() == '-' || number > largest) return false;
    text.remove_prefix(static_cast<size_t>(parsed.ptr - text.data()));
    if (text.empty()) return false;
    while (next < count && units[next] != text.front()) ++next;
    if (next == count) return false;
    numbers[next++] = number;
    text.remove_prefix(1);
  }
  return std::any_of(numbers.begin(), numbers.end(), [](int64_t number) { return number > 0; });
}

// What the user wrote, cut to what fits into a message.
std::string quoted(std::string_view text) {
  constexpr size_t longest = 40;
  return fmt::format("'{}{}'", text.substr(0, longest), text.size() > longest ? "..." : "");
}

// How far the clock on the wall is ahead of UTC.
std::chrono::seconds local_offset(std::chrono::sys_time<std::chrono::milliseconds> moment) {
  const auto rounded = std::chrono::floor<std::chrono::seconds>(moment);
  const std::time_t seconds = rounded.time_since_epoch().count();
  std::tm local = {};
  ::localtime_r(&seconds, &local);
  return std::chrono::seconds(local.tm_gmtoff);
}

}  // namespace

Result<CalendarDuration> parse_calendar_duration(std::string_view text) {
  std::array<int64_t, 4> numbers;
  if (!parse_units(text, std::array{'y', 'm', 'd', 'h'}, 10000, numbers)) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("{} is not a duration on the calendar", quoted(text)))
            .with_remedy("Give years, months, days and hours in this order: 2y5m7d3h, 14d, 6m."));
  }
  return CalendarDuration{static_cast<int>(numbers[0]), static_cast<int>(numbers[1]),
                          static_cast<int>(numbers[2]), static_cast<int>(numbers[3])};
}

std::string to_string(const CalendarDuration& duration) {
  std::string text;
  if (duration.years) text += fmt::format("{}y", duration.years);
  if (duration.months) text += fmt::format("{}m", duration.months);
  if (duration.days) text += fmt::format("{}d", duration.days);
  if (duration.hours) text += fmt::format("{}h", duration.hours);
  return text;
}

int64_t subtract(int64_t unix_ms, const CalendarDuration& duration) {
  using namespace std::chrono;
  constexpr sys_time<milliseconds> last = sys_days(year(10000) / 1 / 1) - milliseconds(1);
  const sys_time<milliseconds> moment(
      milliseconds(std::clamp<int64_t>(unix_ms, 0, last.time_since_epoch().count())));
  const auto local = moment + local_offset(moment);
  const sys_days day = floor<days>(local);
  const year_month_day date(day);
  const year_month month =
      year_month(date.year(), date.month()) - years(duration.years) - months(duration.months);
  // The day of the month is added as a number of days: so it runs over.
  const sys_days then =
      sys_days(month / 1) + (date.day() - std::chrono::day(1)) - days(duration.days);
  // As Go's time.Date() looks for the moment, and so restic: mktime(3) may take
  // another one of an hour that comes twice, or not at all.
  const auto local_then = then + (local - day);
  const auto nearly = local_then - local_offset(local_then);
  const auto moment_then = local_then - local_offset(nearly) - hours(duration.hours);
  return moment_then.time_since_epoch() / milliseconds(1);
}

Result<std::chrono::seconds> parse_clock_duration(std::string_view text) {
  constexpr std::array<int64_t, 4> seconds = {86400, 3600, 60, 1};
  constexpr int64_t largest = largest_clock_days * seconds[0];
  std::array<int64_t, 4> numbers;
  int64_t total = largest + 1;
  if (parse_units(text, std::array{'d', 'h', 'm', 's'}, largest, numbers)) {
    total = 0;
    for (size_t i = 0; i < numbers.size(); ++i) total += numbers[i] * seconds[i];
  }
  if (total > largest) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("{} is not a duration", quoted(text)))
            .with_remedy("Give days, hours, minutes and seconds in this order: 26h, 90m, 1d12h, "
                         "45s; at most 36500d."));
  }
  return std::chrono::seconds(total);
}

}  // namespace vmsnap
