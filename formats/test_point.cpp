#include "formats/test_point.h"

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>

namespace vmsnap {

namespace {

std::string_view variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? std::string_view(value) : std::string_view();
}

}  // namespace

void reach_test_point(std::string_view name) {
  static const std::string_view kill_at = variable("VMSNAP_KILL_AT");
  static const std::string_view stop_at = variable("VMSNAP_STOP_AT");
  static std::atomic<bool> stopped = false;
  if (!kill_at.empty() && kill_at == name) ::kill(::getpid(), SIGKILL);
  // The whole process stands still, not this thread alone.
  if (!stop_at.empty() && stop_at == name && !stopped.exchange(true)) ::kill(::getpid(), SIGSTOP);
}

}  // namespace vmsnap
