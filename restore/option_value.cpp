#include "restore/option_value.h"

#include <algorithm>

#include "formats/json.h"

namespace vmsnap {

namespace {

// Splits at single commas; a doubled comma is one that belongs to the text.
std::vector<std::string> split_at_commas(std::string_view text) {
  std::vector<std::string> words(1);
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != ',') {
      words.back() += text[i];
    } else if (i + 1 < text.size() && text[i + 1] == ',') {
      words.back() += text[++i];
    } else {
      words.emplace_back();
    }
  }
  return words;
}

}  // namespace

std::string escape_commas(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    escaped += c;
    if (c == ',') escaped += c;
  }
  return escaped;
}

OptionValue OptionValue::parse(std::string_view text, std::string_view implied) {
  OptionValue value;
  if (text.starts_with('{') && !nested_too_deep(text)) {
    value.json_ = nlohmann::ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (value.json_.is_object()) {
      value.is_json_ = true;
      return value;
    }
  }
  if (text.empty()) return value;
  for (std::string& word : split_at_commas(text)) {
    Pair pair;
    const size_t equals = word.find('=');
    if (equals != std::string::npos) {
      pair.key = word.substr(0, equals);
      pair.value = word.substr(equals + 1);
    } else if (value.pairs_.empty()) {
      pair = {std::string(implied), std::move(word), /*implied=*/true, /*bare=*/false};
    } else {
      pair = {std::move(word), "on", /*implied=*/false, /*bare=*/true};
    }
    value.pairs_.push_back(std::move(pair));
  }
  return value;
}

bool OptionValue::empty() const { return is_json_ ? json_.empty() : pairs_.empty(); }

const nlohmann::ordered_json* OptionValue::find(std::string_view key) const {
  const nlohmann::ordered_json* within = &json_;
  for (;;) {
    const auto found = within->find(std::string(key));
    if (found != within->end()) return &*found;
    const size_t dot = key.find('.');
    if (dot == std::string_view::npos) return nullptr;
    const auto outer = within->find(std::string(key.substr(0, dot)));
    if (outer == within->end() || !outer->is_object()) return nullptr;
    within = &*outer;
    key.remove_prefix(dot + 1);
  }
}

std::optional<std::string> OptionValue::get(std::string_view key) const {
  if (!is_json_) {
    for (auto pair = pairs_.rbegin(); pair != pairs_.rend(); ++pair) {
      if (pair->key == key) return pair->value;
    }
    return std::nullopt;
  }
  const nlohmann::ordered_json* found = find(key);
  if (!found) return std::nullopt;
  if (found->is_string()) return found->get<std::string>();
  if (found->is_boolean()) return found->get<bool>() ? "on" : "off";
  if (found->is_object()) {
    const auto type = found->find("type");
    if (type != found->end() && type->is_string()) return type->get<std::string>();
  }
  return found->dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

bool OptionValue::is_null(std::string_view key) const {
  if (!is_json_) return get(key) == "";
  const nlohmann::ordered_json* found = find(key);
  return found && found->is_null();
}

void OptionValue::set(std::string_view key, std::string_view value) {
  if (is_json_) {
    auto* found = const_cast<nlohmann::ordered_json*>(find(key));
    (found ? *found : json_[std::string(key)]) = std::string(value);
    return;
  }
  const auto first =
      std::find_if(pairs_.begin(), pairs_.end(), [&](const Pair& pair) { return pair.key == key; });
  if (first == pairs_.end()) {
    pairs_.push_back({std::string(key), std::string(value)});
    return;
  }
  first->value = value;
  first->bare = false;
  pairs_.erase(
      std::remove_if(first + 1, pairs_.end(), [&](const Pair& pair) { return pair.key == key; }),
      pairs_.end());
}

void OptionValue::remove(std::string_view key) {
  if (is_json_) {
    json_.erase(std::string(key));
    return;
  }
  std::erase_if(pairs_, [&](const Pair& pair) { return pair.key == key; });
}

std::string OptionValue::text() const {
  if (is_json_) {
    return json_line(json_);
  }
  std::string text;
  for (size_t i = 0; i < pairs_.size(); ++i) {
    const Pair& pair = pairs_[i];
    if (i > 0) text += ',';
    if (pair.implied) {
      text += escape_commas(pair.value);
    } else if (pair.bare) {
      text += escape_commas(pair.key);
    } else {
      text += escape_commas(pair.key) + '=' + escape_commas(pair.value);
    }
  }
  return text;
}

}  // namespace vmsnap
