// The --keep options of the command line.
#include <CLI/CLI.hpp>

#include "formats/retention.h"

namespace vmsnap {

namespace {

// CLI11's checks say what is wrong by a text, empty for nothing.
std::string complaint(const Error& error) { return error.message() + ". " + error.remedy(); }

}  // namespace

void add_keep_options(CLI::App& app, KeepRule& rule) {
  const auto add_count = [&app](const char* name, int& count, const char* help) {
    app.add_option(name, count, help)->type_name("N")->transform(CLI::Validator(
        [](std::string& text) {
          const auto parsed = parse_keep_count(text);
          if (!parsed) return complaint(parsed.error());
          text = std::to_string(*parsed);
          return std::string();
        },
        ""));
  };
  add_count("--keep-last", rule.last, "Keep the last N (or 'unlimited') of each VM");
  add_count("--keep-hourly", rule.hourly, "Keep the last of each hour, for N hours with one");
  add_count("--keep-daily", rule.daily, "Keep the last of each day, for N days with one");
  add_count("--keep-weekly", rule.weekly, "Keep the last of each week, for N weeks with one");
  add_count("--keep-monthly", rule.monthly, "Keep the last of each month, for N months with one");
  add_count("--keep-yearly", rule.yearly, "Keep the last of each year, for N years with one");
  app.add_option_function<std::string>(
         "--keep-within",
         [&rule](const std::string& text) {
           if (const auto parsed = parse_calendar_duration(text)) rule.within = *parsed;
         },
         "Keep what is newer than this before a VM's newest (2y5m7d3h; m: months)")
      ->type_name("DURATION")
      ->check(CLI::Validator(
          [](std::string& text) {
            const auto parsed = parse_calendar_duration(text);
            return parsed ? std::string() : complaint(parsed.error());
          },
          ""));
  app.add_option_function<std::vector<std::string>>(
         "--keep-tag",
         [&rule](const std::vector<std::string>& lists) {
           for (const std::string& list : lists) rule.keep_tags.push_back(parse_tag_list(list));
         },
         "Keep what has this tag, or all of A,B (repeatable)")
      ->type_name("TAG")
      ->allow_extra_args(false);
}

}  // namespace vmsnap
