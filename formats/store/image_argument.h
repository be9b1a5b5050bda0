// How a command is told which image: a file, or a snapshot in a store.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/image_reader.h"
#include "formats/key_source.h"
#include "formats/store/store.h"

namespace CLI {
class App;
class Option;
}

namespace vmsnap {

struct StoreArgument {
  std::string directory;  // empty: none was given
  KeySource key;

  StoreOptions options() const { return {directory, key}; }
};

// --store DIR, and the options that say what its key is.
CLI::Option* add_store_option(CLI::App& command, StoreArgument& argument);

// For commands that write a store, or else a file: ErrorCode::usage for a key without
// a store, since a file is never encrypted.
Status check_key_has_store(const StoreArgument& argument);

// --delta: see ImageWriterOptions.
CLI::Option* add_delta_option(CLI::App& command, bool& deltas);

// --lock-wait TIME: how long to wait for StoreLock::maintain.
void add_lock_wait_option(CLI::App& command, std::string& text);
// Empty is no time at all.
Result<std::chrono::seconds> parse_lock_wait(const std::string& text);

struct ImageArgument {
  std::string name;  // a path; with a store an id, the beginning of one, or "latest"
  StoreArgument store;
  std::string vm;    // whose latest
};

// The positional argument FILE, and --store, --vm and the key's options.
CLI::Option* add_image_argument(CLI::App& command, ImageArgument& argument);

// A path may also be that of a snapshot in a store, as ImageReader::path()
// says it: the store around it is opened then. The reader keeps its store open.
Result<std::unique_ptr<ImageReader>> open_image(const ImageArgument& argument);

// The image's file and, of a snapshot in a store, the directories in which its
// packs may be: what is still to be opened when it is read.
std::vector<std::string> paths_of(const ImageReader& image);

}  // namespace vmsnap
