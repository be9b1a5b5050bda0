// JSON, read and written in one place: with limits, and without exceptions.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <string_view>

namespace vmsnap {

inline constexpr size_t max_json_nesting = 64;  // arrays and objects

// Whether more arrays and objects are within each other than are safe: values are
// copied, compared and written recursively.
bool nested_too_deep(std::string_view json);

// A text from a file or a socket, whose length the caller has bounded. Discarded
// (is_discarded()) if it is no JSON, or nested too deep. No comments.
nlohmann::json parse_json(std::string_view text);

// On one line, without its end. What is not UTF-8 becomes U+FFFD.
std::string json_line(const nlohmann::json& json);
std::string json_line(const nlohmann::ordered_json& json);

// For people: over several lines, and the end of the last.
std::string json_lines(const nlohmann::json& json);
void print_json(std::ostream& out, const nlohmann::ordered_json& json);

}  // namespace vmsnap
