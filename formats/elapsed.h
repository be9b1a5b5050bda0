// Time that has passed, as figures are reported: milliseconds with a fraction.
#pragma once

#include <chrono>

namespace vmsnap {

inline double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace vmsnap
