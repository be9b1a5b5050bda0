#include "formats/store/store_config.h"

#include <filesystem>
#include <system_error>

#include "formats/damage.h"
#include "formats/file.h"
#include "formats/image_file.h"
#include "formats/image_tail.h"
#include "formats/json.h"
#include "formats/key_slots.h"
#include "formats/metadata.h"
#include "formats/store/pack_file.h"

namespace vmsnap {

namespace {

constexpr const char* format_name = "vmsnap store";
constexpr size_t max_config = 1 << 20;

tl::unexpected<Error> needs_no_key(const StorePaths& paths) {
  return fail(ErrorCode::usage, "a key was given, but the store {} is not encrypted", paths.root);
}

}  // namespace

Result<bool> is_store(const StorePaths& paths) {
  std::error_code error;
  const bool there = std::filesystem::exists(paths.config(), error);
  if (!error) return there;
  const bool forbidden = error == std::errc::permission_denied;
  return tl::unexpected(
      Error::from_errno(error.value(), fmt::format("cannot look for {}", paths.config()),
                        forbidden ? ErrorCode::privilege : ErrorCode::io)
          .with_remedy(forbidden ? "Run vmsnap as the owner of the store, which is root for most." : ""));
}

Status check_is_store(const StorePaths& paths) {
  if (VMSNAP_TRY(is_store(paths))) return {};
  return tl::unexpected(Error(ErrorCode::usage, paths.root + " is not a store")
                            .with_remedy("Give the directory that 'vmsnap snapshot --store' or "
                                         "'vmsnap import --store' made."));
}

Result<StoreConfig> parse_store_config(const std::string& json, const std::string& name) {
  const auto document = parse_json(json);
  if (json.size() > max_config || !document.is_object()) {
    return damaged(name, "it is not a JSON object");
  }
  if (!document.contains("format") || document["format"] != format_name ||
      !document.contains("version") || !document["version"].is_number_unsigned()) {
    return damaged(name, "it does not say that it is a store's");
  }
  if (document["version"] != StoreConfig::version) {
    return tl::unexpected(
        Error(ErrorCode::unsupported,
              fmt::format("{}: the store has version {}, newer than this vmsnap's {}", name,
                          json_line(document["version"]), StoreConfig::version))
            .with_remedy("Use a newer vmsnap."));
  }
  StoreConfig config;
  layout::ImageId id;
  if (document.contains("id") && document["id"].is_string()) {
    config.id = document["id"].get<std::string>();
  }
  if (!parse_id(config.id, id)) return damaged(name, "its id is not 32 hexadecimal digits");
  if (document.contains("keys")) config.slots = document["keys"];
  return config;
}

Result<StoreConfig> read_store_config(const StorePaths& paths) {
  return parse_store_config(VMSNAP_TRY(read_small_file(paths.config(), max_config)),
                            paths.config());
}

Result<StoreConfig> make_store_config(const std::optional<KeyMaterial>& key) {
  StoreConfig config;
  config.id = id_text(VMSNAP_TRY(random_id()));
  if (key) {
    const SecretKey master = VMSNAP_TRY(SecretKey::random());
    config.slots = nlohmann::json::array({VMSNAP_TRY(make_slot(master, *key))});
  }
  return config;
}

Status write_store_config(const StorePaths& paths, const StoreConfig& config, bool replace) {
  nlohmann::json document = {
      {"format", format_name}, {"version", StoreConfig::version}, {"id", config.id}};
  if (config.sealed()) document["keys"] = config.slots;
  const std::string text = json_lines(document);
  AtomicFile file = VMSNAP_TRY(AtomicFile::create(paths.config(), replace));
  VMSNAP_CHECK(write_all(file.fd(), std::as_bytes(std::span(text)), paths.config()));
  return file.commit();
}

Result<std::optional<SecretKey>> unlock_store(const StoreConfig& config, const StorePaths& paths,
                                              const KeySource& key) {
  if (config.sealed()) return unlock_store(config, paths, VMSNAP_TRY(read_key(key)));
  // One from the environment may be meant for another store.
  if (names_a_key(key)) return needs_no_key(paths);
  return std::optional<SecretKey>();
}

Result<std::optional<SecretKey>> unlock_store(const StoreConfig& config, const StorePaths& paths,
                                              const std::optional<KeyMaterial>& key) {
  if (!config.sealed() && key) return needs_no_key(paths);
  if (!config.sealed()) return std::optional<SecretKey>();
  if (!key) {
    return tl::unexpected(
        Error(ErrorCode::wrong_key, fmt::format("the store {} is encrypted", paths.root))
            .with_remedy("Give its key: --key-file, --passphrase-file, --passphrase-command, or "
                         "the environment variable VMSNAP_PASSPHRASE."));
  }
  return std::optional<SecretKey>(VMSNAP_TRY(unlock(config.slots, *key, paths.config())));
}

}  // namespace vmsnap
