#include "restore/record_fields.h"

#include <fmt/format.h>

namespace vmsnap {

Error wrong_field(const char* field) {
  return Error(ErrorCode::damaged, fmt::format("its \"{}\" is missing or wrong", field));
}

Result<uint64_t> number_field(const nlohmann::json& json, const char* field, uint64_t limit) {
  const auto found = json.find(field);
  if (found == json.end() || !found->is_number_integer() ||
      (!found->is_number_unsigned() && found->get<int64_t>() < 0) ||
      found->get<uint64_t>() > limit) {
    return tl::unexpected(wrong_field(field));
  }
  return found->get<uint64_t>();
}

Result<std::string> text_field(const nlohmann::json& json, const char* field) {
  const auto found = json.find(field);
  if (found == json.end() || !found->is_string()) return tl::unexpected(wrong_field(field));
  return found->get<std::string>();
}

Result<bool> flag_field(const nlohmann::json& json, const char* field) {
  const auto found = json.find(field);
  if (found == json.end() || !found->is_boolean()) return tl::unexpected(wrong_field(field));
  return found->get<bool>();
}

}  // namespace vmsnap
