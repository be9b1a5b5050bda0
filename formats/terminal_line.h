// One line of a terminal, drawn over and over: progress.
//
// One thread. Writes nothing at all unless it is a terminal; removes the line
// when destroyed.
#pragma once

#include <chrono>
#include <ostream>
#include <string_view>

namespace vmsnap {

class TerminalLine {
 public:
  TerminalLine(std::ostream& out, bool terminal) : out_(out), terminal_(terminal) {}
  ~TerminalLine() { clear(); }
  TerminalLine(const TerminalLine&) = delete;

  // Whether a draw is worth making: five times a second at most.
  bool due() const {
    return terminal_ && (!visible_ || std::chrono::steady_clock::now() - drawn_ >= interval);
  }
  void draw(std::string_view text) {
    if (!terminal_) return;
    // Back to the start of the line, then whatever is longer is erased.
    out_ << "\r" << text << "\033[K" << std::flush;
    drawn_ = std::chrono::steady_clock::now();
    visible_ = true;
  }
  void clear() {
    if (visible_) out_ << "\r\033[K" << std::flush;
    visible_ = false;
  }

 private:
  static constexpr std::chrono::milliseconds interval{200};

  std::ostream& out_;
  bool terminal_;
  bool visible_ = false;
  std::chrono::steady_clock::time_point drawn_;
};

}  // namespace vmsnap
