// Going into the background: what a forked child does that is to serve on when
// the command has returned.
#pragma once

#include <signal.h>

#include <string>

namespace vmsnap {

// A session of its own, no terminal; what is logged goes to `log_path`, with
// the time. Ctrl-C and a hang-up are ignored; SIGTERM ends it like any process.
void become_background(const std::string& log_path);

// Keeps SIGINT, SIGTERM and SIGHUP back while it lives: around the fork, so that none
// of them meets a child that has yet to become_background().
class HeldSignals {
 public:
  HeldSignals();
  ~HeldSignals();
  HeldSignals(const HeldSignals&) = delete;
  HeldSignals& operator=(const HeldSignals&) = delete;

 private:
  sigset_t before_;
};

}  // namespace vmsnap
