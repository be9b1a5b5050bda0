// How commands write what they found.
#pragma once

#include <cstdint>
#include <string>

namespace vmsnap {

// Text from elsewhere may hold anything, also what drives a terminal.
std::string printable(const std::string& text);

std::string human_bytes(uint64_t bytes);  // "1.5 MiB"

// "2024-11-20 22:11:40.123 UTC"
std::string utc_text(int64_t unix_ms);

}  // namespace vmsnap
