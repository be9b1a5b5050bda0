#include "formats/test_point.h"

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdlib>

namespace vmsnap {

namespace {

std::string_view variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? std::string_view(value) : std::string_view();
}

struct StopAt {
  std::string_view name;
  uint64_t time = 1;  // from one

  static StopAt parse(std::string_view text) {
    const size_t colon = text.find(':');
    if (colon == text.npos) return {text};
    return {text.substr(0, colon), std::strtoull(text.data() + colon + 1, nullptr, 10)};
  }
};

}  // namespace

void reach_test_point(std::string_view name) {
  static const std::string_view kill_at = variable("VMSNAP_KILL_AT");
  static const StopAt stop_at = StopAt::parse(variable("VMSNAP_STOP_AT"));
  static std::atomic<uint64_t> times = 0;
  if (!kill_at.empty() && kill_at == name) ::kill(::getpid(), SIGKILL);
  // The whole process stands still. By raise(), so that this thread is the first: of
  // a signal to the process another may be told, and this one goes on until it was.
  if (!stop_at.name.empty() && stop_at.name == name && ++times == stop_at.time) ::raise(SIGSTOP);
}

}  // namespace vmsnap
