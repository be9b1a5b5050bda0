// The value of one QEMU option, in either of the two syntaxes that QEMU reads:
//
//   memory-backend-ram,id=m0,size=1G           keys and values
//   {"qom-type":"memory-backend-ram", ...}     JSON (what libvirt writes)
//
// Values, not threads; nothing here blocks or fails. What is not changed comes
// out as it went in.
//
// Source: qemu-options of qemu(1); commas in a value are doubled.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace vmsnap {

class OptionValue {
 public:
  // `implied` is the key that the first word stands for when it has no '='
  // ("qom-type" of -object, "type" of -netdev). A text that starts with '{' but
  // is no JSON object is read as keys and values, and so kept as it is.
  static OptionValue parse(std::string_view text, std::string_view implied);

  bool is_json() const { return is_json_; }
  bool empty() const;
  bool has(std::string_view key) const { return get(key).has_value(); }
  // Whether a key is there and says that there is none: null, or nothing after '='.
  bool is_null(std::string_view key) const;

  // The last value of a key, as QEMU takes it; a key alone is "on", JSON true
  // and false are "on" and "off". Of a JSON object value, its "type"; what is
  // within it has a key with a dot ("addr.path"), as in the other syntax.
  std::optional<std::string> get(std::string_view key) const;

  // Replaces every occurrence by one, in place of the first; appends if there
  // is none.
  void set(std::string_view key, std::string_view value);
  void remove(std::string_view key);

  std::string text() const;

 private:
  struct Pair {
    std::string key;
    std::string value;
    bool implied = false;  // written without its key
    bool bare = false;     // written without a value
  };

  const nlohmann::ordered_json* find(std::string_view key) const;

  bool is_json_ = false;
  nlohmann::ordered_json json_;
  std::vector<Pair> pairs_;
};

// Doubles the commas of `text`, for use as a value of a key.
std::string escape_commas(std::string_view text);

}  // namespace vmsnap
