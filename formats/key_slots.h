// The master key of a store, wrapped by the keys of its users.
//
// The master key is random and never changes; it is stored once for each user's
// key, in a slot of its own. So a passphrase is changed by adding one slot and
// removing another, and no data is written anew.
//
// A slot is a JSON object:
//   "id"               8 hexadecimal digits, random
//   "kind"             "passphrase" or "key_file"; slots of other kinds are skipped
//   "created_unix_ms"  when it was made
//   "salt"             base64, 16 bytes
//   "ops", "memory"    of a passphrase: Argon2id's passes and bytes
//   "nonce"            base64, 24 bytes
//   "sealed"           base64: the master key in an XSalsa20-Poly1305 box
//                      (crypto_secretbox), 48 bytes
// The box's key is Argon2id(passphrase, salt), or BLAKE2b-256 of the key file's
// content, keyed with the salt.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "formats/error.h"
#include "formats/secret_key.h"

namespace vmsnap {

enum class KeyKind { passphrase, key_file };

// What a user has: a passphrase, or the content of a key file. Not empty.
struct KeyMaterial {
  KeyKind kind = KeyKind::passphrase;
  SecretBytes secret;
};

inline constexpr size_t max_key_slots = 64;
inline constexpr size_t max_key_file = 1 << 20;

// How much work trying one passphrase is.
struct PassphraseCost {
  uint64_t ops = 0;     // passes over the memory
  uint64_t memory = 0;  // bytes
};

// libsodium's "moderate": 256 MiB and most of a second.
extern const PassphraseCost default_passphrase_cost;

// A new slot that `material` opens. Takes the time and memory of `cost`.
Result<nlohmann::json> make_slot(const SecretKey& master, const KeyMaterial& material,
                                 PassphraseCost cost = default_passphrase_cost);

// The master key, from the first slot that `material` opens; `name` is the
// file that the slots are from. ErrorCode::wrong_key if it opens none,
// ErrorCode::damaged if `slots` is not an array of proper slots or wants more
// than 4 GiB or 100 passes. Takes the time and memory of every passphrase slot
// that it tries. Any JSON is safe.
Result<SecretKey> unlock(const nlohmann::json& slots, const KeyMaterial& material,
                         const std::string& name);

}  // namespace vmsnap
