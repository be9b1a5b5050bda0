// How many threads share the work that keeps processors busy, unless somebody says.
#pragma once

#include <algorithm>
#include <thread>

namespace vmsnap {

// As many as processors that we may use, but no more than eight: each has buffers.
inline unsigned default_threads() { return std::clamp(std::thread::hardware_concurrency(), 1u, 8u); }

}  // namespace vmsnap
