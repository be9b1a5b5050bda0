// The wall clock, in the unit in which times are kept.
#pragma once

#include <chrono>
#include <cstdint>

namespace vmsnap {

inline int64_t now_unix_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count();
}

}  // namespace vmsnap
