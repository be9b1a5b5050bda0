#include "formats/store/verify_state.h"

#include <nlohmann/json.hpp>

#include "formats/clock.h"
#include "formats/file.h"
#include "formats/image_file.h"
#include "formats/json.h"
#include "formats/store/pack_file.h"
#include "formats/store/store_lock.h"

namespace vmsnap {

namespace {

constexpr size_t max_verify_state = 64 << 20;  // more packs than a store may have

}  // namespace

VerifyState VerifyState::load(const StorePaths& paths) {
  const auto text = read_small_file(paths.verified(), max_verify_state);
  if (!text) return {};
  const auto json = parse_json(*text);
  if (!json.is_object() || !json.contains("packs") || !json["packs"].is_object()) return {};
  const int64_t now = now_unix_ms();
  const auto not_ahead = [now](int64_t at) { return at > now ? 0 : at; };
  VerifyState state;
  if (json.contains("began") && json["began"].is_number_integer()) {
    state.began_unix_ms = not_ahead(json["began"].get<int64_t>());
  }
  for (const auto& [name, pack] : json["packs"].items()) {
    layout::ImageId id;
    if (!parse_id(name, id) || !pack.is_object() || !pack.contains("at") ||
        !pack["at"].is_number_integer() || !pack.contains("ok") || !pack["ok"].is_boolean()) {
      return {};
    }
    state.packs[id] = {not_ahead(pack["at"].get<int64_t>()), pack["ok"].get<bool>()};
  }
  return state;
}

Status VerifyState::save(const StorePaths& paths) const {
  nlohmann::json json = {{"packs", nlohmann::json::object()}};
  if (began_unix_ms != 0) json["began"] = began_unix_ms;
  for (const auto& [id, pack] : packs) {
    json["packs"][id_text(id)] = {{"at", pack.at_unix_ms}, {"ok", pack.ok}};
  }
  return write_small_file(paths.verified(), json_line(json) + "\n");
}

void VerifyState::add(const layout::ImageId& id, const Pack& pack) {
  Pack& last = packs[id];
  if (last.at_unix_ms <= pack.at_unix_ms) last = pack;
}

Status VerifyState::update(const StorePaths& paths,
                           const std::function<void(VerifyState&)>& change) {
  const StoreLock lock = VMSNAP_TRY(StoreLock::verified(paths));
  VerifyState state = load(paths);
  change(state);
  return state.save(paths);
}

}  // namespace vmsnap
