#include "formats/store/image_argument.h"

#include <CLI/CLI.hpp>
#include <filesystem>

#include "formats/duration.h"
#include "formats/store/manifest.h"
#include "formats/store/store_paths.h"

namespace vmsnap {

namespace fs = std::filesystem;

namespace {

Result<std::unique_ptr<ImageReader>> open_in_store(const StoreOptions& options,
                                                   const std::string& name, const std::string& vm) {
  const std::shared_ptr<const Store> store = VMSNAP_TRY(Store::open(options));
  const std::string id = VMSNAP_TRY(resolve_snapshot(*store, Where::snapshots, name, vm));
  return store->open_snapshot(id, store);
}

}  // namespace

CLI::Option* add_store_option(CLI::App& command, StoreArgument& argument) {
  CLI::Option* option =
      command.add_option("--store", argument.directory, "The store")->type_name("DIR");
  add_key_options(command, argument.key);
  return option;
}

Status check_key_has_store(const StoreArgument& argument) {
  if (!argument.directory.empty() || !names_a_key(argument.key)) return {};
  return tl::unexpected(
      Error(ErrorCode::usage, "a key was given, but an image file is never encrypted")
          .with_remedy("Write into an encrypted store: --store DIR, with the key. Or leave out the key."));
}

CLI::Option* add_delta_option(CLI::App& command, bool& deltas) {
  return command.add_flag("--delta", deltas,
                          "Store pages as differences from similar ones: smaller, and slower");
}

void add_lock_wait_option(CLI::App& command, std::string& text) {
  command
      .add_option("--lock-wait", text,
                  "How long to wait for another prune, repair or change of keys, such as 10m")
      ->type_name("TIME");
}

Result<std::chrono::seconds> parse_lock_wait(const std::string& text) {
  return text.empty() ? std::chrono::seconds(0) : parse_clock_duration(text);
}

CLI::Option* add_image_argument(CLI::App& command, ImageArgument& argument) {
  CLI::Option* option = command.add_option(
      "FILE", argument.name,
      "The image; with --store a snapshot: its id, the beginning of it, or 'latest'");
  CLI::Option* store = add_store_option(command, argument.store);
  command.add_option("--vm", argument.vm, "With 'latest': of the VM with this name, or that backup calls so")
      ->type_name("NAME")
      ->needs(store);
  return option;
}

Result<std::unique_ptr<ImageReader>> open_image(const ImageArgument& argument) {
  if (!argument.store.directory.empty()) {
    return open_in_store(argument.store.options(), argument.name, argument.vm);
  }
  const fs::path path = fs::absolute(argument.name);
  const std::string around = store_around(path.string());
  if (around.empty() || path.parent_path().filename() != "snapshots") return ImageReader::open(argument.name);
  return open_in_store({around, argument.store.key}, path.filename().string(), {});
}

std::vector<std::string> paths_of(const ImageReader& image) {
  std::vector<std::string> paths = {image.path()};
  const StorePaths store = {store_around(image.path())};
  if (store.root.empty()) return paths;
  paths.insert(paths.end(), {store.root, store.packs(), store.condemned(), store.quarantine()});
  return paths;
}

}  // namespace vmsnap
