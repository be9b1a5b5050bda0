#include "formats/json.h"

namespace vmsnap {

namespace {

template <class Json>
std::string text_of(const Json& json, int indent) {
  return json.dump(indent, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
}

}  // namespace

bool nested_too_deep(std::string_view json) {
  size_t depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > max_json_nesting) return true;
    } else if ((c == ']' || c == '}') && depth > 0) {
      --depth;
    }
  }
  return false;
}

nlohmann::json parse_json(std::string_view text) {
  if (nested_too_deep(text)) return nlohmann::json::value_t::discarded;
  return nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
}

std::string json_line(const nlohmann::json& json) { return text_of(json, -1); }
std::string json_line(const nlohmann::ordered_json& json) { return text_of(json, -1); }
std::string json_lines(const nlohmann::json& json) { return text_of(json, 2) + "\n"; }

void print_json(std::ostream& out, const nlohmann::ordered_json& json) {
  out << text_of(json, 2) << '\n';
}

}  // namespace vmsnap
