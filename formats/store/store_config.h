// store.json: that a directory is a store, which version, and how its key is
// wrapped.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "formats/error.h"
#include "formats/key_source.h"
#include "formats/secret_key.h"
#include "formats/store/store_paths.h"

namespace vmsnap {

struct StoreConfig {
  static constexpr int version = 1;

  std::string id;        // 32 hexadecimal digits
  nlohmann::json slots;  // of the master key (key_slots.h); null: not sealed

  bool sealed() const { return !slots.is_null(); }
};

// Whether the directory holds one; ErrorCode::privilege if it may not be looked into.
Result<bool> is_store(const StorePaths& paths);
// ErrorCode::usage if there is none: the directory is no store.
Status check_is_store(const StorePaths& paths);

// ErrorCode::damaged for what is not one, unsupported for a newer version.
// Any bytes are safe.
Result<StoreConfig> parse_store_config(const std::string& json, const std::string& name);
Result<StoreConfig> read_store_config(const StorePaths& paths);

// Of a new store; sealed with a new random key if there is a key to open it with.
Result<StoreConfig> make_store_config(const std::optional<KeyMaterial>& key);
Status write_store_config(const StorePaths& paths, const StoreConfig& config, bool replace);

// The master key; none for a store that is not sealed. ErrorCode::wrong_key if
// the key is missing or wrong, usage if a key is given that nothing needs.
Result<std::optional<SecretKey>> unlock_store(const StoreConfig& config, const StorePaths& paths,
                                              const KeySource& key);
// The same with what read_key() gave: a descriptor or a pipe gives it once.
Result<std::optional<SecretKey>> unlock_store(const StoreConfig& config, const StorePaths& paths,
                                              const std::optional<KeyMaterial>& key);

}  // namespace vmsnap
