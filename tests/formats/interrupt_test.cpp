// Ctrl-C and its like. Each in a process of its own: a signal stays noted.
#include "formats/interrupt.h"

#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>

namespace vmsnap {
namespace {

[[noreturn]] void end_after(int number) {
  install_interrupt_handlers();
  std::raise(number);
  std::_Exit(interrupted() ? 3 : 4);
}

TEST(Interrupt, IsNoted) {
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    EXPECT_EXIT(end_after(number), testing::ExitedWithCode(3), "") << number;
  }
}

TEST(Interrupt, TheSecondOneEndsTheProcess) {
  const auto insist = [] {
    install_interrupt_handlers();
    std::raise(SIGINT);
    std::raise(SIGINT);
  };
  EXPECT_EXIT(insist(), testing::KilledBySignal(SIGINT), "");
}

TEST(Interrupt, AClosedTerminalMayHangUpTwice) {
  const auto hang_up = [] {
    install_interrupt_handlers();
    std::raise(SIGHUP);
    end_after(SIGHUP);
  };
  EXPECT_EXIT(hang_up(), testing::ExitedWithCode(3), "");
}

TEST(Interrupt, NohupIsObeyed) {
  const auto hang_up = [] {
    std::signal(SIGHUP, SIG_IGN);
    end_after(SIGHUP);
  };
  EXPECT_EXIT(hang_up(), testing::ExitedWithCode(4), "");
}

}  // namespace
}  // namespace vmsnap
