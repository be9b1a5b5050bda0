#include "formats/size.h"

#include <charconv>
#include <cmath>

namespace vmsnap {

Result<uint64_t> parse_size(std::string_view text) {
  double number = 0;
  const auto [rest, error] =
      std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  std::string_view unit(rest, static_cast<size_t>(text.data() + text.size() - rest));
  if (unit.size() == 3 && unit.ends_with("iB")) unit.remove_suffix(2);
  constexpr std::string_view units = "KMGT";
  const size_t power = unit.size() == 1 ? units.find(unit[0]) : units.npos;
  const bool known = unit.empty() ? rest == text.data() + text.size() : power != units.npos;
  if (known && !unit.empty()) number = std::ldexp(number, 10 * static_cast<int>(power + 1));
  if (error != std::errc() || !known || !(number >= 1) || number > std::ldexp(1.0, 60)) {
    return tl::unexpected(Error(ErrorCode::usage, fmt::format("'{}' is not a size", text))
                              .with_remedy("Give bytes, or a number with K, M, G or T behind it: 64M."));
  }
  return static_cast<uint64_t>(number);
}

}  // namespace vmsnap
