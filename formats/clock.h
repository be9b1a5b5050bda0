// The wall clock, in the unit in which times are kept.
#pragma once

#include <chrono>
#include <cstdint>

namespace vmsnap {

inline int64_t now_unix_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count();
}

// Whether what was made at `created` is at most `limit` old. Not if it is dated
// ahead by more than clocks differ: it would pass for new until that day comes,
// and hide that nothing was made since.
inline bool is_fresh(int64_t created_unix_ms, int64_t now_unix_ms, std::chrono::milliseconds limit) {
  constexpr std::chrono::milliseconds most_ahead = std::chrono::minutes(5);
  const int64_t age = now_unix_ms - created_unix_ms;
  return age <= limit.count() && age >= -most_ahead.count();
}

}  // namespace vmsnap
