// How the layers offer their commands to the program's main.
//
// Each layer has one add_*_commands(); main parses, runs what was chosen,
// prints the error if there was one, and exits with its status. Commands write
// to the streams given here, so that tests run them in-process.
#pragma once

#include <functional>
#include <iosfwd>

#include "formats/error.h"

namespace CLI {
class App;
}

namespace vmsnap {

struct CommandContext {
  std::ostream& out;
  std::ostream& err;
  bool terminal = false;  // whether progress may be drawn on `err`
  // Set by the chosen subcommand's callback; main calls it after parsing.
  std::function<Status()> run;
};

// show, verify, export
void add_image_commands(CLI::App& app, CommandContext& context);

}  // namespace vmsnap
