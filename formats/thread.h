// Threads whose start can fail (EAGAIN: pids.max, TasksMax, RLIMIT_NPROC), which
// the standard library tells by an exception.
#pragma once

#include <future>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "formats/error.h"

namespace vmsnap {

inline Error no_thread(const std::system_error& why) {
  return Error::from_errno(why.code().value(), "cannot start a thread")
      .with_remedy("Raise the limit of processes (ulimit -u, TasksMax, pids.max).");
}

// Any thread; does not block. The caller joins what it gets.
template <class Work>
Result<std::thread> start_thread(Work work) {
  try {
    return std::thread(std::move(work));
  } catch (const std::system_error& why) {
    return tl::unexpected(no_thread(why));
  }
}

// As many that do the same as there is room for, `count` at most; an error if that is
// none, though some are wanted.
template <class Work>
Result<std::vector<std::thread>> start_threads(size_t count, const Work& work) {
  std::vector<std::thread> threads;
  while (threads.size() < count) {
    auto thread = start_thread(work);
    if (!thread && threads.empty()) return tl::unexpected(std::move(thread).error());
    if (!thread) break;
    threads.push_back(*std::move(thread));
  }
  return threads;
}

// One whose end can be waited for with a limit. An exception of `work`
// must not leave it: it would vanish in the future.
template <class Work>
Result<std::future<void>> start_async(Work work) {
  try {
    return std::async(std::launch::async, std::move(work));
  } catch (const std::system_error& why) {
    return tl::unexpected(no_thread(why));
  }
}

}  // namespace vmsnap
