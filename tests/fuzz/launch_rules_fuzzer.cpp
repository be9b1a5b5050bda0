// A recorded command line is any words. Deriving one from it either fails with
// a reason or gives one that starts a waiting VM in the run directory; and the
// values of options come out of their parser as they went in.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>

#include "restore/launch_rules.h"
#include "restore/option_value.h"

using namespace vmsnap;

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

// The words are separated by newlines; those after a word "--" are the extra
// arguments.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  LaunchRequest request;
  request.run_dir = "/run/d";
  request.record.executable = "/usr/bin/qemu-system-x86_64";
  request.record.machine = "pc-i440fx-7.2";
  request.record.arguments = {"qemu"};
  bool after_dashes = false;
  for (size_t start = 0; start <= text.size();) {
    const size_t end = std::min(text.find('\n', start), text.size());
    const std::string word(text.substr(start, end - start));
    start = end + 1;
    if (!after_dashes && word == "--") {
      after_dashes = true;
      continue;
    }
    (after_dashes ? request.extra : request.record.arguments).push_back(word);

    const OptionValue value = OptionValue::parse(word, "type");
    if (!value.is_json()) require(value.text() == word);
    require(OptionValue::parse(value.text(), "type").text() == value.text());
  }

  const auto line = derive_launch_line(request);
  if (!line) {
    require(!line.error().message().empty());
    return 0;
  }
  require(line->arguments.at(0) == request.record.executable);
  const std::vector<std::string> ours = {"-S", "-incoming", "defer"};
  require(std::search(line->arguments.begin(), line->arguments.end(), ours.begin(), ours.end()) !=
          line->arguments.end());
  return 0;
}
