// Where a user's key comes from: an option of the command, or else the
// environment. Never from the command line itself, which everybody can read.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/key_slots.h"

namespace CLI {
class App;
}

namespace vmsnap {

// At most one is set; none: the environment variable of the same name, with
// VMSNAP_ in front, is asked, and VMSNAP_PASSPHRASE, the passphrase itself.
struct KeySource {
  std::optional<std::string> key_file;
  std::optional<std::string> passphrase_file;     // its first line
  std::optional<std::string> passphrase_command;  // for sh -c; the first line of its output
  std::optional<int> passphrase_fd;               // the first line; no byte behind it is read
};

// Whether an option names one; the environment is not asked.
bool names_a_key(const KeySource& source);

inline constexpr size_t max_passphrase = 4096;

// --key-file, --passphrase-file, --passphrase-command, --passphrase-fd.
// `source` must live until the command line is parsed.
void add_key_options(CLI::App& command, KeySource& source);

// The key, or nothing if there is no sign of one. ErrorCode::usage for more
// than one source, for an empty passphrase or file or one that is too long
// (4096 bytes; key files 1 MiB); warns of files that others can read. Blocks
// until the command, or whoever writes into the descriptor, is done. Asks the
// environment: not while another thread changes it.
Result<std::optional<KeyMaterial>> read_key(const KeySource& source);

// This process's environment without the variables that hold or name a key,
// for programs that we start; without the null pointer at the end. Borrows
// environ(7).
std::vector<char*> environment_without_keys();

}  // namespace vmsnap
