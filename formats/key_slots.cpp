#include "formats/key_slots.h"

#include <sodium.h>

#include <array>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/clock.h"

namespace vmsnap {

const PassphraseCost default_passphrase_cost = {crypto_pwhash_OPSLIMIT_MODERATE,
                                                crypto_pwhash_MEMLIMIT_MODERATE};

namespace {

constexpr uint64_t max_ops = 100;
constexpr uint64_t max_memory = uint64_t{4} << 30;
constexpr int base64 = sodium_base64_VARIANT_ORIGINAL;

struct Slot {
  KeyKind kind = KeyKind::passphrase;
  PassphraseCost cost;
  std::array<unsigned char, crypto_pwhash_SALTBYTES> salt = {};
  std::array<unsigned char, crypto_secretbox_NONCEBYTES> nonce = {};
  std::array<unsigned char, SecretKey::size + crypto_secretbox_MACBYTES> sealed = {};
};

const char* kind_name(KeyKind kind) {
  return kind == KeyKind::passphrase ? "passphrase" : "key_file";
}

const unsigned char* data_of(const KeyMaterial& material) {
  return reinterpret_cast<const unsigned char*>(material.secret.bytes().data());
}

std::string to_base64(std::span<const unsigned char> bytes) {
  std::string text(sodium_base64_encoded_len(bytes.size(), base64), '\0');
  ::sodium_bin2base64(text.data(), text.size(), bytes.data(), bytes.size(), base64);
  text.pop_back();  // the terminating zero
  return text;
}

// False unless `object` has exactly as many bytes there.
bool read_base64(const nlohmann::json& object, const char* key, std::span<unsigned char> out) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_string()) return false;
  const std::string& text = found->get_ref<const std::string&>();
  size_t length = 0;
  return ::sodium_base642bin(out.data(), out.size(), text.data(), text.size(), nullptr, &length,
                             nullptr, base64) == 0 &&
         length == out.size();
}

bool read_number(const nlohmann::json& object, const char* key, uint64_t least, uint64_t most,
                 uint64_t& out) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_number_unsigned()) return false;
  out = found->get<uint64_t>();
  return out >= least && out <= most;
}

bool read_kind(const nlohmann::json& json, std::string& kind) {
  if (!json.is_object()) return false;
  const auto found = json.find("kind");
  if (found == json.end() || !found->is_string()) return false;
  kind = found->get<std::string>();
  return true;
}

bool read_slot(const nlohmann::json& json, Slot& slot) {
  if (slot.kind == KeyKind::passphrase &&
      (!read_number(json, "ops", crypto_pwhash_OPSLIMIT_MIN, max_ops, slot.cost.ops) ||
       !read_number(json, "memory", crypto_pwhash_MEMLIMIT_MIN, max_memory, slot.cost.memory))) {
    return false;
  }
  return read_base64(json, "salt", slot.salt) && read_base64(json, "nonce", slot.nonce) &&
         read_base64(json, "sealed", slot.sealed);
}

tl::unexpected<Error> damaged_slots(const std::string& name, const std::string& what) {
  return tl::unexpected(
      Error(ErrorCode::damaged, fmt::format("{} is damaged: {}", name, what))
          .with_remedy("Use another copy of it: without its key slots nothing can be read."));
}

// The slots of this kind; all are checked before any is tried.
Result<std::vector<Slot>> read_slots(const nlohmann::json& slots, KeyKind kind,
                                     const std::string& name) {
  if (!slots.is_array() || slots.empty()) return damaged_slots(name, "it has no key slots");
  if (slots.size() > max_key_slots) {
    return damaged_slots(name, fmt::format("it has more than {} key slots", max_key_slots));
  }
  std::vector<Slot> result;
  for (size_t number = 0; number < slots.size(); ++number) {
    std::string kind_of_slot;
    Slot slot = {.kind = kind, .cost = {}};
    if (read_kind(slots[number], kind_of_slot)) {
      if (kind_of_slot != kind_name(kind)) continue;
      if (read_slot(slots[number], slot)) {
        result.push_back(slot);
        continue;
      }
    }
    return damaged_slots(name, fmt::format("its key slot {} is invalid", number));
  }
  return result;
}

// The key of the box. Out of memory is the one way in which it fails.
Result<SecretBytes> slot_key(const Slot& slot, const KeyMaterial& material) {
  SecretBytes key = VMSNAP_TRY(SecretBytes::create(crypto_secretbox_KEYBYTES));
  const auto out = reinterpret_cast<unsigned char*>(key.bytes().data());
  if (slot.kind == KeyKind::key_file) {
    ::crypto_generichash(out, key.size(), data_of(material), material.secret.size(),
                         slot.salt.data(), slot.salt.size());
    return key;
  }
  if (::crypto_pwhash(out, key.size(), reinterpret_cast<const char*>(data_of(material)),
                      material.secret.size(), slot.salt.data(), slot.cost.ops, slot.cost.memory,
                      crypto_pwhash_ALG_ARGON2ID13) != 0) {
    return tl::unexpected(
        Error(ErrorCode::io, fmt::format("cannot compute a key from the passphrase: it takes {} "
                                         "MiB of memory",
                                         slot.cost.memory >> 20))
            .with_remedy("Free some memory, or use a key file."));
  }
  return key;
}

std::optional<SecretKey> open_slot(const Slot& slot, const SecretBytes& key) {
  std::array<uint8_t, SecretKey::size> master;
  const bool opened = ::crypto_secretbox_open_easy(
                          master.data(), slot.sealed.data(), slot.sealed.size(), slot.nonce.data(),
                          reinterpret_cast<const unsigned char*>(key.bytes().data())) == 0;
  std::optional<SecretKey> result;
  if (opened) result = SecretKey::from_bytes(master).value();  // libsodium was ready for `key`
  ::sodium_memzero(master.data(), master.size());
  return result;
}

tl::unexpected<Error> opens_nothing(const std::string& name, KeyKind kind, bool any_of_kind) {
  const bool passphrase = kind == KeyKind::passphrase;
  if (!any_of_kind) {
    return tl::unexpected(
        Error(ErrorCode::wrong_key, fmt::format("{} is not encrypted with a {}", name,
                                                passphrase ? "passphrase" : "key file"))
            .with_remedy(passphrase ? "Give its key file with --key-file."
                                    : "Give its passphrase."));
  }
  return tl::unexpected(
      Error(ErrorCode::wrong_key, fmt::format("the {} is not the one of {}",
                                              passphrase ? "passphrase" : "key file", name))
          .with_remedy(passphrase ? "Try again; capitals, blanks and line ends count."
                                  : "Give the key file that it was made with, unchanged."));
}

}  // namespace

Result<nlohmann::json> make_slot(const SecretKey& master, const KeyMaterial& material,
                                 PassphraseCost cost) {
  Slot slot = {.kind = material.kind, .cost = cost};
  ::randombytes_buf(slot.salt.data(), slot.salt.size());
  ::randombytes_buf(slot.nonce.data(), slot.nonce.size());
  const SecretBytes key = VMSNAP_TRY(slot_key(slot, material));
  ::crypto_secretbox_easy(slot.sealed.data(), master.bytes().data(), SecretKey::size,
                          slot.nonce.data(),
                          reinterpret_cast<const unsigned char*>(key.bytes().data()));
  nlohmann::json json = {{"id", fmt::format("{:08x}", ::randombytes_random())},
                         {"kind", kind_name(slot.kind)},
                         {"created_unix_ms", now_unix_ms()},
                         {"salt", to_base64(slot.salt)},
                         {"nonce", to_base64(slot.nonce)},
                         {"sealed", to_base64(slot.sealed)}};
  if (slot.kind == KeyKind::passphrase) {
    json["ops"] = cost.ops;
    json["memory"] = cost.memory;
  }
  return json;
}

Result<SecretKey> unlock(const nlohmann::json& slots, const KeyMaterial& material,
                         const std::string& name) {
  const std::vector<Slot> candidates = VMSNAP_TRY(read_slots(slots, material.kind, name));
  for (const Slot& slot : candidates) {
    const SecretBytes key = VMSNAP_TRY(slot_key(slot, material));
    if (auto master = open_slot(slot, key)) return std::move(*master);
  }
  return opens_nothing(name, material.kind, !candidates.empty());
}

}  // namespace vmsnap
