// Fields of what is read back from a run directory. ErrorCode::damaged, with
// the field's name, for one that is missing or not what it must be.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "formats/error.h"

namespace vmsnap {

Error wrong_field(const char* field);

// A whole number from 0 to `limit`.
Result<uint64_t> number_field(const nlohmann::json& json, const char* field, uint64_t limit);
Result<std::string> text_field(const nlohmann::json& json, const char* field);
Result<bool> flag_field(const nlohmann::json& json, const char* field);

}  // namespace vmsnap
