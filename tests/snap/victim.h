// A child process for tests to work on: it has memory of a given kind, and
// does with it what the test's function says.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>

#include "snap/vmm/process.h"

namespace vmsnap {

// Memory shared between the test and its victim, to talk through.
template <class T>
T* shared_with_victim() {
  void* memory = ::mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return new (memory) T();
}

// Private memory that starts where a huge page can; null when there is none. It
// lives as long as the process.
inline char* map_for_huge_pages(uint64_t bytes) {
  constexpr uint64_t huge = 2 << 20;
  void* memory = ::mmap(nullptr, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  return reinterpret_cast<char*>((reinterpret_cast<uint64_t>(memory) + huge - 1) & ~(huge - 1));
}

// Within a minute, if only for a moment.
inline bool becomes_true(const std::function<bool()>& condition) {
  for (int i = 0; i < 60000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

class Victim {
 public:
  // `body` runs in the child; when it returns, the child exits with its value.
  explicit Victim(const std::function<int()>& body) : pid_(::fork()) {
    if (pid_ == 0) {
      ::alarm(120);  // never outlives a test that was killed by much
      ::_exit(body());
    }
  }
  ~Victim() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      (void)wait();
    }
  }
  Victim(const Victim&) = delete;

  pid_t pid() const { return pid_; }
  Process process() const { return *Process::open(pid_); }

  // Exit status, or 1000 + signal.
  int wait() {
    int status = 0;
    if (::waitpid(pid_, &status, 0) != pid_) return -1;
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }

 private:
  pid_t pid_;
};

}  // namespace vmsnap
