#include "formats/store/key_command.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <memory>
#include <ostream>

#include "formats/key_slots.h"
#include "formats/key_source.h"
#include "formats/store/image_argument.h"
#include "formats/store/store_config.h"
#include "formats/store/store_lock.h"
#include "formats/text.h"

namespace vmsnap {

namespace {

struct KeyOptions {
  StoreArgument store;
  std::string new_key_file, new_passphrase_file, remove;
  std::string lock_wait;  // empty: not at all
};

// Neither changes the master key, so that no pack is written anew.
Result<std::string> add_slot(StoreConfig& config, const SecretKey& master,
                             const KeyOptions& options) {
  KeySource source;
  if (!options.new_key_file.empty()) source.key_file = options.new_key_file;
  if (!options.new_passphrase_file.empty()) source.passphrase_file = options.new_passphrase_file;
  const auto material = VMSNAP_TRY(read_key(source));
  if (config.slots.size() >= max_key_slots) {
    return fail(ErrorCode::refused, "the store has {} keys, which is all it can have",
                config.slots.size());
  }
  config.slots.push_back(VMSNAP_TRY(make_slot(master, *material)));
  return fmt::format("key {} was added", config.slots.back()["id"].get<std::string>());
}

// Whatever the file has in its place: it may have been changed by hand.
std::string text_of(const nlohmann::json& slot, const char* key) {
  const auto found = slot.is_object() ? slot.find(key) : slot.end();
  return found != slot.end() && found->is_string() ? found->get<std::string>() : std::string();
}

std::string date_of(const nlohmann::json& slot) {
  const auto found = slot.is_object() ? slot.find("created_unix_ms") : slot.end();
  return found != slot.end() && found->is_number_integer() ? utc_text(found->get<int64_t>()) : std::string();
}

Result<std::string> remove_slot(StoreConfig& config, const std::string& id) {
  for (size_t i = 0; i < config.slots.size(); ++i) {
    if (text_of(config.slots[i], "id") != id) continue;
    if (config.slots.size() == 1) {
      return fail(ErrorCode::refused, "key {} is the only one: nothing could open the store", id);
    }
    config.slots.erase(i);
    return fmt::format("key {} was removed", id);
  }
  return tl::unexpected(Error(ErrorCode::usage, "the store has no key " + id)
                            .with_remedy("'vmsnap key' without --remove shows those it has."));
}

Status run_key(CommandContext& context, const KeyOptions& options) {
  const StorePaths paths = {options.store.directory};
  const auto wait = VMSNAP_TRY(parse_lock_wait(options.lock_wait));
  VMSNAP_CHECK(check_is_store(paths));
  const StoreLock lock = VMSNAP_TRY(StoreLock::maintain(paths, wait));
  StoreConfig config = VMSNAP_TRY(read_store_config(paths));
  // Only who can open the store may look, or change who can.
  const auto master = VMSNAP_TRY(unlock_store(config, paths, options.store.key));
  if (!master) return fail(ErrorCode::usage, "the store {} is not encrypted", paths.root);
  const bool adds = !options.new_key_file.empty() || !options.new_passphrase_file.empty();
  if (!adds && options.remove.empty()) {
    for (const auto& slot : config.slots) {
      context.out << fmt::format("{}  {:10}  {}\n", text_of(slot, "id"), text_of(slot, "kind"),
                                 date_of(slot));
    }
    return {};
  }
  std::string done;
  if (adds) done = VMSNAP_TRY(add_slot(config, *master, options));
  if (!options.remove.empty()) {
    done += (done.empty() ? "" : "\n") + VMSNAP_TRY(remove_slot(config, options.remove));
  }
  VMSNAP_CHECK(write_store_config(paths, config, /*replace=*/true));
  context.out << done << '\n';
  return {};
}

}  // namespace

void add_key_command(CLI::App& app, CommandContext& context) {
  const auto options = std::make_shared<KeyOptions>();
  CLI::App* command =
      app.add_subcommand("key", "List, add and remove the keys of an encrypted store");
  add_store_option(*command, options->store)->required();
  auto* file = command->add_option("--new-key-file", options->new_key_file,
                                   "Let the content of this file open the store, too");
  command
      ->add_option("--new-passphrase-file", options->new_passphrase_file,
                   "Let the passphrase on the first line of this file open it, too")
      ->excludes(file);
  command->add_option("--remove", options->remove, "Remove the key with this id")->type_name("ID");
  add_lock_wait_option(*command, options->lock_wait);
  command->footer(
      "Examples:\n"
      "  vmsnap key --store /backup/vms --key-file old --new-key-file new\n"
      "  vmsnap key --store /backup/vms --key-file new --remove 3f2a91c0");
  command->callback([&context, options] {
    context.run = [&context, options] { return run_key(context, *options); };
  });
}

}  // namespace vmsnap
