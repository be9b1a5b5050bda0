#include "formats/metadata.h"

#include <string_view>
#include <utility>
#include <vector>

#include "formats/damage.h"
#include "formats/image_layout.h"
#include "formats/json.h"
#include "formats/text.h"

namespace vmsnap {

namespace {

constexpr uint64_t no_address = ~uint64_t{0};

// Names reach terminals, in errors and lists: no C0 or C1 controls, no DEL.
bool has_control_character(std::string_view utf8) {
  for (size_t i = 0; i < utf8.size(); ++i) {
    const auto byte = static_cast<unsigned char>(utf8[i]);
    const bool c1 =
        byte == 0xc2 && i + 1 < utf8.size() && static_cast<unsigned char>(utf8[i + 1]) < 0xa0;
    if (byte < 0x20 || byte == 0x7f || c1) return true;
  }
  return false;
}

bool proper_tag(const std::string& text) {
  return text.size() <= max_tag_bytes && !has_control_character(text);
}

// As encode_metadata() writes it: what is not UTF-8 becomes longer.
std::string as_written(const std::string& text) {
  return parse_json(json_line(nlohmann::json(text))).get<std::string>();
}

// Why `info` breaks a rule, or an empty string. Numbers regions' first pages.
std::string number_regions(ImageInfo& info, uint64_t page_count) {
  if (info.id.size() != 32 || info.id.find_first_not_of("0123456789abcdef") != std::string::npos) {
    return "\"id\" is not 32 hexadecimal digits";
  }
  if (info.created_unix_ms < 0 || info.created_unix_ms > max_created_unix_ms) {
    return "\"created_unix_ms\" is out of range";
  }
  if (!info.source.is_object()) return "\"source\" is not an object";
  if (info.tags.size() > max_tags) return fmt::format("more than {} tags", max_tags);
  for (const std::string& text : info.tags) {
    if (!proper_tag(text) || text.empty()) return "a tag is empty, too long, or has a control character";
  }
  if (!proper_tag(info.domain)) return "\"domain\" is too long, or has a control character";
  if (info.regions.size() > max_regions) return fmt::format("more than {} regions", max_regions);
  uint64_t pages = 0;
  for (Region& region : info.regions) {
    if (region.name.size() > max_region_name) {
      return fmt::format("a region's name is longer than {} bytes", max_region_name);
    }
    if (has_control_character(region.name)) return "a region's name has a control character";
    if (region.length == 0 || region.length % page_size != 0) {
      return "a region's length is not a multiple of 4096, or is 0";
    }
    region.first_page = pages;
    pages += region.length / page_size;
    if (pages > page_count) break;  // here, so that the sum cannot overflow
  }
  if (pages != page_count) return fmt::format("the regions do not add up to {} pages", page_count);
  return {};
}

const nlohmann::json* member(const nlohmann::json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() ? nullptr : &*found;
}

bool read_text(const nlohmann::json& object, const char* key, std::string& out) {
  const nlohmann::json* value = member(object, key);
  if (!value || !value->is_string()) return false;
  out = value->get_ref<const std::string&>();
  return true;
}

bool read_unsigned(const nlohmann::json& object, const char* key, uint64_t& out) {
  const nlohmann::json* value = member(object, key);
  if (!value || !value->is_number_unsigned()) return false;
  out = value->get<uint64_t>();
  return true;
}

bool read_region(const nlohmann::json& json, Region& region) {
  if (!json.is_object() || !read_text(json, "name", region.name) ||
      !read_unsigned(json, "length", region.length)) {
    return false;
  }
  const nlohmann::json* address = member(json, "address");
  if (address && address->is_null()) {
    region.address = no_address;
    return true;
  }
  return read_unsigned(json, "address", region.address);
}

// Why the document is not what it must be, or an empty string.
std::string read_document(nlohmann::json& document, ImageInfo& info) {
  if (!document.is_object()) return "it is not a JSON object";
  if (!read_text(document, "id", info.id)) return "\"id\" is missing or not a string";
  uint64_t created = 0;
  if (!read_unsigned(document, "created_unix_ms", created) ||
      created > static_cast<uint64_t>(max_created_unix_ms)) {
    return "\"created_unix_ms\" is missing or out of range";
  }
  info.created_unix_ms = static_cast<int64_t>(created);
  const nlohmann::json* regions = member(document, "regions");
  if (!regions || !regions->is_array()) return "\"regions\" is missing or not an array";
  if (regions->size() > max_regions) return fmt::format("more than {} regions", max_regions);
  for (const nlohmann::json& json : *regions) {
    if (!read_region(json, info.regions.emplace_back())) {
      return "a region lacks a proper name, address or length";
    }
  }
  if (const nlohmann::json* tags = member(document, "tags")) {
    if (!tags->is_array() || tags->size() > max_tags) return "\"tags\" is not a short array";
    for (const nlohmann::json& tag : *tags) {
      if (!tag.is_string()) return "a tag is not a string";
      info.tags.push_back(tag.get<std::string>());
    }
  }
  if (member(document, "domain") && !read_text(document, "domain", info.domain)) {
    return "\"domain\" is not a string";
  }
  if (member(document, "added_bytes") &&
      !read_unsigned(document, "added_bytes", info.added_bytes)) {
    return "\"added_bytes\" is not a number";
  }
  const auto source = document.find("source");
  if (source == document.end()) return "\"source\" is missing";
  info.source = std::move(*source);
  return {};
}

}  // namespace

Status check_tags(const std::vector<std::string>& tags, const std::string& domain) {
  const auto wrong = [](std::string message, const char* remedy) {
    return tl::unexpected(Error(ErrorCode::usage, std::move(message)).with_remedy(remedy));
  };
  if (tags.size() > max_tags) {
    return wrong(fmt::format("{} tags are more than the {} that an image can have", tags.size(), max_tags),
                 "Give fewer.");
  }
  for (const std::string& tag : tags) {
    if (!tag.empty() && proper_tag(as_written(tag))) continue;
    return wrong(fmt::format("the tag '{}' is empty, longer than {} bytes, or has a control character",
                             printable(tag.substr(0, 40)), max_tag_bytes),
                 "Give another one.");
  }
  if (proper_tag(as_written(domain))) return {};
  return wrong(fmt::format("the dedup domain '{}' is longer than {} bytes, or has a control character",
                           printable(domain.substr(0, 40)), max_tag_bytes),
               "Give another name.");
}

Result<std::string> encode_metadata(const ImageInfo& info, uint64_t page_count,
                                    const std::string& name) {
  nlohmann::json regions = nlohmann::json::array();
  for (const Region& region : info.regions) {
    regions.push_back({{"name", region.name},
                       {"address", region.address == no_address ? nlohmann::json()
                                                                : nlohmann::json(region.address)},
                       {"length", region.length}});
  }
  nlohmann::json document = {{"id", info.id},
                                   {"created_unix_ms", info.created_unix_ms},
                                   {"regions", std::move(regions)},
                                   {"source", info.source}};
  if (!info.tags.empty()) document["tags"] = info.tags;
  if (!info.domain.empty()) document["domain"] = info.domain;
  if (info.added_bytes != 0) document["added_bytes"] = info.added_bytes;
  std::string json = json_line(document);
  const auto read_back = decode_metadata(std::as_bytes(std::span(json)), page_count, name);
  if (!read_back) {
    return fail(ErrorCode::io, "cannot write an image that could not be read: {}",
                read_back.error().message());
  }
  return json;
}

Result<ImageInfo> decode_metadata(std::span<const std::byte> json, uint64_t page_count,
                                  const std::string& name) {
  const std::string_view text(reinterpret_cast<const char*>(json.data()), json.size());
  if (text.size() > layout::max_metadata) return damaged(name, "its metadata is more than 16 MiB");
  nlohmann::json document = parse_json(text);
  if (document.is_discarded()) return damaged(name, "its metadata is not JSON, or nested too deep");
  ImageInfo info;
  std::string wrong = read_document(document, info);
  if (wrong.empty()) wrong = number_regions(info, page_count);
  if (!wrong.empty()) return damaged(name, "its metadata is invalid: {}", wrong);
  return info;
}

}  // namespace vmsnap
