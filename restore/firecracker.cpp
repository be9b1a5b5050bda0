#include "restore/firecracker.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "formats/interrupt.h"
#include "formats/json.h"
#include "snap/vmm/descriptor_message.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

namespace {

constexpr uint64_t huge_page = DecodedExtent::max_pages * page_size;

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

template <class... Args>
tl::unexpected<Error> bad(fmt::format_string<Args...> format, Args&&... args) {
  return fail(ErrorCode::usage, "bad handshake: {}",
              fmt::format(format, std::forward<Args>(args)...));
}

// A member that must be a whole number; none if it is absent.
Result<std::optional<uint64_t>> number(const nlohmann::json& region, size_t index,
                                       const char* name) {
  const auto found = region.find(name);
  if (found == region.end()) return std::nullopt;
  if (!found->is_number_unsigned()) {
    return bad("region {}: \"{}\" is not a whole number", index, name);
  }
  return found->get<uint64_t>();
}

Result<uint64_t> required(const nlohmann::json& region, size_t index, const char* name) {
  const std::optional<uint64_t> value = VMSNAP_TRY(number(region, index, name));
  if (!value) return bad("region {}: \"{}\" is missing", index, name);
  return *value;
}

Result<uint64_t> unit_of(const nlohmann::json& region, size_t index) {
  const std::optional<uint64_t> bytes = VMSNAP_TRY(number(region, index, "page_size"));
  std::optional<uint64_t> old = VMSNAP_TRY(number(region, index, "page_size_kib"));
  if (old == 4 || old == 2048) *old *= 1024;
  if (bytes && old && *bytes != *old) {
    return bad("region {}: \"page_size\" ({}) and \"page_size_kib\" ({}) do not agree", index,
               *bytes, *old);
  }
  const uint64_t unit = bytes.value_or(old.value_or(page_size));
  if (unit != page_size && unit != huge_page) {
    return bad("region {}: pages of {} bytes are not served, only 4096 and 2097152", index, unit);
  }
  return unit;
}

Result<ServedRange> parse_region(const nlohmann::json& region, size_t index, uint64_t image_pages) {
  if (!region.is_object()) return bad("region {} is not a JSON object", index);
  const uint64_t base = VMSNAP_TRY(required(region, index, "base_host_virt_addr"));
  const uint64_t size = VMSNAP_TRY(required(region, index, "size"));
  const uint64_t offset = VMSNAP_TRY(required(region, index, "offset"));
  const uint64_t unit = VMSNAP_TRY(unit_of(region, index));
  if (base == 0) return bad("region {}: it begins at address 0", index);
  if (size == 0) return bad("region {}: it is empty", index);
  if (base % unit != 0 || size % unit != 0) {
    return bad("region {}: {:#x} (+{:#x}) is not a whole number of {} byte pages", index, base,
               size, unit);
  }
  if (offset % page_size != 0)
    return bad("region {}: offset {:#x} is not page aligned", index, offset);
  if (size > ~uint64_t{0} - base) return bad("region {}: it wraps around address 0", index);
  const uint64_t first = offset / page_size, pages = size / page_size;
  if (first > image_pages || pages > image_pages - first) {
    return bad("region {}: bytes {:#x} (+{:#x}) are not within the image of {:#x} bytes", index,
               offset, size, image_pages * page_size);
  }
  return ServedRange{{RemotePtr(base), size}, first, unit, fmt::format("region {}", index)};
}

// `start_of` and `length_of` project ranges onto a line; no two may touch.
template <class Start, class Length>
Status check_apart(const std::vector<ServedRange>& ranges, const char* where, Start start_of,
                   Length length_of) {
  std::vector<const ServedRange*> sorted;
  for (const ServedRange& range : ranges) sorted.push_back(&range);
  std::sort(sorted.begin(), sorted.end(), [&](const ServedRange* a, const ServedRange* b) {
    return start_of(*a) < start_of(*b);
  });
  for (size_t i = 1; i < sorted.size(); ++i) {
    if (start_of(*sorted[i]) - start_of(*sorted[i - 1]) < length_of(*sorted[i - 1])) {
      return bad("{} and {} overlap in {}", sorted[i - 1]->name, sorted[i]->name, where);
    }
  }
  return {};
}

}  // namespace

ArrayScanner::State ArrayScanner::add(std::string_view piece) {
  for (const char c : piece) {
    if (done_) {
      followed_ |= !is_space(c);
    } else if (in_string_) {
      if (!escaped_ && c == '"') in_string_ = false;
      escaped_ = !escaped_ && c == '\\';
    } else if (!begun_) {
      if (is_space(c)) continue;
      if (c != '[') return State::not_an_array;
      begun_ = true;
      depth_ = 1;
    } else if (c == '"') {
      in_string_ = true;
    } else if (c == '[' || c == '{') {
      ++depth_;
    } else if (c == ']' || c == '}') {
      done_ = --depth_ == 0;
    }
  }
  return done_ ? State::complete : State::incomplete;
}

Result<std::vector<ServedRange>> parse_handshake(std::string_view message, uint64_t image_pages) {
  if (message.size() > handshake_max_bytes) {
    return bad("the message has more than {} bytes", handshake_max_bytes);
  }
  const auto json = parse_json(message);
  if (json.is_discarded()) return bad("the message is not JSON");
  if (!json.is_array()) return bad("the message is not a JSON array");
  if (json.empty()) return bad("it names no region");
  if (json.size() > handshake_max_regions) {
    return bad("it names {} regions, more than {}", json.size(), handshake_max_regions);
  }
  std::vector<ServedRange> ranges;
  for (size_t i = 0; i < json.size(); ++i) {
    ranges.push_back(VMSNAP_TRY(parse_region(json[i], i, image_pages)));
  }
  VMSNAP_CHECK(check_apart(
      ranges, "memory", [](const ServedRange& r) { return r.range.start.address(); },
      [](const ServedRange& r) { return r.range.length; }));
  // A page that one region gives back would be zero in the other.
  VMSNAP_CHECK(check_apart(
      ranges, "the image", [](const ServedRange& r) { return r.first_page; },
      [](const ServedRange& r) { return r.page_count(); }));
  return ranges;
}

namespace {

// Waits for bytes; a closed connection is readable too.
Status wait_readable(int socket, std::chrono::steady_clock::time_point deadline) {
  for (;;) {
    VMSNAP_CHECK(check_interrupted());
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return bad("it is not whole within the time limit");
    pollfd readable = {socket, POLLIN, 0};
    // Short, because a signal may be taken by another thread.
    if (::poll(&readable, 1, static_cast<int>(std::min<int64_t>(left.count(), 200))) > 0) return {};
  }
}

}  // namespace

Result<Handshake> receive_handshake(int socket, uint64_t image_pages,
                                    std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  std::string message;
  std::vector<Fd> descriptors;
  ArrayScanner scanner;
  for (auto state = ArrayScanner::State::incomplete; state != ArrayScanner::State::complete;) {
    VMSNAP_CHECK(wait_readable(socket, deadline));
    std::array<char, 16384> piece;
    // One descriptor is expected, a second tells that it is not alone.
    const auto [got, flags] = receive_with_descriptors(
        socket, std::as_writable_bytes(std::span(piece)), 2, descriptors, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) continue;
    if (got < 0) return fail_errno(errno, "cannot receive a handshake");
    if (flags & MSG_CTRUNC) return bad("too many descriptors came with it");
    if (descriptors.size() > 1) {
      return bad("{} descriptors came with it, not one", descriptors.size());
    }
    if (got == 0) return bad("the connection was closed after {} bytes", message.size());
    const std::string_view text(piece.data(), static_cast<size_t>(got));
    message += text;
    if (message.size() > handshake_max_bytes) {
      return bad("the message has more than {} bytes", handshake_max_bytes);
    }
    state = scanner.add(text);
    if (state == ArrayScanner::State::not_an_array) return bad("the message is not a JSON array");
  }
  if (scanner.followed()) return bad("something follows the JSON array");
  Handshake handshake;
  handshake.ranges = VMSNAP_TRY(parse_handshake(message, image_pages));
  if (descriptors.empty()) return bad("no userfaultfd came with it");
  if (!is_userfaultfd(descriptors[0]))
    return bad("the descriptor that came with it is no userfaultfd");
  handshake.uffd = std::move(descriptors[0]);
  return handshake;
}

}  // namespace vmsnap
