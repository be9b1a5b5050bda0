#include "restore/launch_rewriter.h"

#include <sys/un.h>

#include <algorithm>
#include <array>
#include <optional>

#include "restore/option_value.h"

namespace vmsnap {

namespace {

template <size_t N>
bool one_of(std::string_view text, const std::array<std::string_view, N>& list) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

// A name that can be a file's, from an id out of somebody's command line.
std::string file_name_of(std::string_view id) {
  std::string name;
  for (const char c : id.substr(0, 64)) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       c == '-' || c == '_' || c == '.';
    name += plain ? c : '_';
  }
  return name.empty() || name[0] == '.' ? "_" + name : name;
}

}  // namespace

std::span<const LaunchRewriter::RuleEntry> LaunchRewriter::rules() {
  static constexpr RuleEntry all[] = {
      {"incoming", &LaunchRewriter::drop},
      {"loadvm", &LaunchRewriter::drop},
      {"S", &LaunchRewriter::drop},
      {"daemonize", &LaunchRewriter::drop},
      {"pidfile", &LaunchRewriter::drop},
      {"qmp", &LaunchRewriter::drop},
      {"qmp-pretty", &LaunchRewriter::drop},
      {"monitor", &LaunchRewriter::drop},
      {"gdb", &LaunchRewriter::drop},
      {"qtest", &LaunchRewriter::drop},
      {"qtest-log", &LaunchRewriter::drop},
      {"s", &LaunchRewriter::drop},
      {"D", &LaunchRewriter::drop},
      {"mem-path", &LaunchRewriter::drop},
      {"mem-prealloc", &LaunchRewriter::drop},
      {"global", &LaunchRewriter::drop_own_global},
      {"trace", &LaunchRewriter::strip_trace},
      {"overcommit", &LaunchRewriter::strip_overcommit},
      {"display", &LaunchRewriter::drop},
      {"vnc", &LaunchRewriter::drop},
      {"spice", &LaunchRewriter::drop},
      {"sdl", &LaunchRewriter::drop},
      {"curses", &LaunchRewriter::drop},
      {"full-screen", &LaunchRewriter::drop},
      {"nographic", &LaunchRewriter::keep_nographic},
      {"nodefaults", &LaunchRewriter::note_nodefaults},
      {"serial", &LaunchRewriter::move_serial},
      {"parallel", &LaunchRewriter::move_parallel},
      {"debugcon", &LaunchRewriter::move_debugcon},
      {"chardev", &LaunchRewriter::move_chardev},
      {"netdev", &LaunchRewriter::detach_network},
      {"nic", &LaunchRewriter::detach_network},
      {"net", &LaunchRewriter::detach_network},
      {"icount", &LaunchRewriter::move_recording},
      {"object", &LaunchRewriter::detach_object},
      {"blockdev", &LaunchRewriter::let_overlays_have_backing},
      {"machine", &LaunchRewriter::pin_machine},
      {"M", &LaunchRewriter::pin_machine},
      {"audiodev", &LaunchRewriter::silence_audio},
      {"audio", &LaunchRewriter::silence_audio},
      {"device", &LaunchRewriter::detach_device},
      {"readconfig", &LaunchRewriter::refuse_config_file},
  };
  return all;
}

Status LaunchRewriter::drop(QemuOption& option) {
  option.dropped = true;
  return {};
}

Status LaunchRewriter::drop_own_global(QemuOption& option) {
  // A VM that was itself restored has it already.
  option.dropped = option.value == send_configuration_off;
  return {};
}

Status LaunchRewriter::keep_nographic(QemuOption&) {
  // It also tells the machine to have no graphics, so it must stay.
  nographic_ = true;
  return {};
}

Status LaunchRewriter::note_nodefaults(QemuOption&) {
  default_serial_ = false;
  return {};
}

namespace {

// "none" and "null" name nothing outside; "chardev:ID" moves with its -chardev.
bool names_nothing_outside(const std::optional<std::string>& value) {
  return !value || *value == "none" || *value == "null" || value->starts_with("chardev:");
}

}  // namespace

Status LaunchRewriter::move_serial(QemuOption& option) {
  default_serial_ = false;
  const int number = serials_++;
  if (names_nothing_outside(option.value)) return {};
  option.value = "file:" + in_dir(fmt::format("serial{}.log", number));
  return {};
}

Status LaunchRewriter::move_parallel(QemuOption& option) {
  const int number = parallels_++;
  if (names_nothing_outside(option.value)) return {};
  option.value = "file:" + in_dir(fmt::format("parallel{}.log", number));
  return {};
}

Status LaunchRewriter::move_debugcon(QemuOption& option) {
  if (!names_nothing_outside(option.value)) option.value = "file:" + in_dir("debugcon.log");
  return {};
}

Result<std::string> LaunchRewriter::socket_path(const std::string& name) const {
  const std::string path = in_dir(name);
  if (path.size() >= sizeof(sockaddr_un::sun_path)) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("the socket path {} is too long ({} bytes, at most {})",
                                            path, path.size(), sizeof(sockaddr_un::sun_path) - 1))
            .with_remedy("Choose a shorter --run-dir."));
  }
  return path;
}

Status LaunchRewriter::move_chardev(QemuOption& option) {
  static constexpr std::array<std::string_view, 9> inside = {
      "null", "ringbuf", "memory", "vc", "msmouse", "wctablet", "testdev", "mux", "qemu-vdagent"};
  static constexpr std::array<std::string_view, 3> two_way = {"socket", "udp", "pty"};
  static constexpr std::array<std::string_view, 3> one_way = {"file", "pipe", "stdio"};
  if (!option.value) return {};
  OptionValue chardev = OptionValue::parse(*option.value, "backend");
  const std::string backend = chardev.get("backend").value_or("");
  if (one_of(backend, inside)) {
    chardev.remove("logfile");
    option.value = chardev.text();
    return {};
  }
  const std::string id = chardev.get("id").value_or("");
  std::string moved = "null";
  if (one_of(backend, two_way)) moved = "socket";
  if (one_of(backend, one_way)) moved = "file";
  moved += ",id=" + escape_commas(id);
  if (moved.starts_with("socket")) {
    const std::string path = VMSNAP_TRY(socket_path(file_name_of(id) + ".sock"));
    moved += ",path=" + escape_commas(path) + ",server=on,wait=off";
  } else if (moved.starts_with("file")) {
    moved += ",path=" + escape_commas(in_dir(file_name_of(id) + ".log"));
  }
  if (chardev.get("mux") == "on") moved += ",mux=on";
  option.value = moved;
  return {};
}

namespace {

// An option of which nothing is left is dropped.
void remove_key(QemuOption& option, std::string_view implied, std::string_view key) {
  OptionValue value = OptionValue::parse(option.value.value_or(""), implied);
  value.remove(key);
  option.value = value.text();
  option.dropped = value.empty();
}

}  // namespace

Status LaunchRewriter::strip_trace(QemuOption& option) {
  remove_key(option, "enable", "file");
  return {};
}

Status LaunchRewriter::strip_overcommit(QemuOption& option) {
  // Locking would fault in all of the memory before the guest may run.
  remove_key(option, "", "mem-lock");
  return {};
}

namespace {

// The address that a network listens on, as the key of its parts.
std::string_view listening_address(const OptionValue& network) {
  const std::string type = network.get("type").value_or("");
  if (type == "dgram") return "local";
  static constexpr std::array<std::string_view, 4> off = {"off", "no", "false", "n"};
  const bool listens = type == "stream" && !one_of(network.get("server").value_or("off"), off);
  return listens ? "addr" : "";
}

}  // namespace

Status LaunchRewriter::detach_network(QemuOption& option) {
  if (!option.value) return {};
  OptionValue network = OptionValue::parse(*option.value, "type");
  const std::string address(listening_address(network));
  if (network.get(address + ".type") == "unix") {
    // QEMU removes a socket that is there already, and removes its own at its end.
    const std::string id = network.get("id").value_or(fmt::format("{}", networks_++));
    network.set(address + ".path", VMSNAP_TRY(socket_path("net-" + file_name_of(id) + ".sock")));
    option.value = network.text();
  }
  if (network.has("hostfwd") || network.has("guestfwd")) {
    network.remove("hostfwd");
    network.remove("guestfwd");
    option.value = network.text();
  }
  return {};
}

Status LaunchRewriter::move_recording(QemuOption& option) {
  OptionValue icount = OptionValue::parse(option.value.value_or(""), implied_key(option.name));
  // One that is replayed is only read. The device state has a part of either,
  // so that the mode stays.
  if (icount.get("rr") != "record") return {};
  icount.set("rrfile", in_dir("replay.bin"));
  option.value = icount.text();
  return {};
}

Status LaunchRewriter::detach_object(QemuOption& option) {
  if (!option.value) return {};
  OptionValue object = OptionValue::parse(*option.value, "qom-type");
  const std::string type = object.get("qom-type").value_or("");
  if (type == "filter-dump") {
    // Another filter may name this one, so it stays.
    object.set("file", "/dev/null");
    option.value = object.text();
    return {};
  }
  if (type != "memory-backend-file" && type != "memory-backend-memfd" &&
      type != "memory-backend-ram") {
    return {};
  }
  object.set("qom-type", "memory-backend-ram");
  for (const std::string_view key :
       {"share", "mem-path", "hugetlb", "hugetlbsize", "seal", "prealloc", "prealloc-threads",
        "prealloc-context", "discard-data", "align", "offset", "pmem", "readonly", "rom"}) {
    object.remove(key);
  }
  option.value = object.text();
  return {};
}

// libvirt says of the last image of a chain that there is none below it. A file that
// takes its place may be an overlay, of which the guest would see zeros then.
Status LaunchRewriter::let_overlays_have_backing(QemuOption& option) {
  if (request_.replacements.empty() || !option.value) return {};
  OptionValue node = OptionValue::parse(*option.value, implied_key(option.name));
  if (!node.is_null("backing")) return {};
  node.remove("backing");
  option.value = node.text();
  return {};
}

Status LaunchRewriter::pin_machine(QemuOption& option) {
  if (request_.record.machine.empty() || !option.value) return {};
  OptionValue machine = OptionValue::parse(*option.value, "type");
  if (!machine.has("type")) return {};  // only properties; the type stands elsewhere
  machine.set("type", request_.record.machine);
  option.value = machine.text();
  machine_pinned_ = true;
  return {};
}

Status LaunchRewriter::silence_audio(QemuOption& option) {
  if (!option.value) return {};
  OptionValue audio = OptionValue::parse(*option.value, "driver");
  const auto driver = audio.get("driver");
  if (driver != "spice" && driver != "dbus" && driver != "wav") return {};
  std::string silent = "none";
  for (const std::string key : {"id", "model"}) {
    if (const auto value = audio.get(key)) silent += fmt::format(",{}={}", key, escape_commas(*value));
  }
  option.value = silent;
  return {};
}

Status LaunchRewriter::detach_device(QemuOption& option) {
  OptionValue device = OptionValue::parse(option.value.value_or(""), "driver");
  if (device.has("pcap")) {
    device.remove("pcap");
    option.value = device.text();
  }
  // A serial port given as a device stands in for the default one.
  if (device.get("driver") == "isa-serial") default_serial_ = false;
  if (device.get("driver") == "vmgenid") {
    // That is what it is for: the guest learns that this is another run.
    device.set("guid", "auto");
    option.value = device.text();
  }
  return {};
}

Status LaunchRewriter::refuse_add_fd(const QemuOption& option) const {
  return tl::unexpected(
      Error(ErrorCode::usage,
            fmt::format("-add-fd {} passes a descriptor that only the original VM had",
                        option.value.value_or("")))
          .with_remedy("Give a replacement with the same set after --: -add-fd fd=N,set=M, "
                       "where N is open in the shell."));
}

Status LaunchRewriter::refuse_config_file(QemuOption& option) {
  const std::string file = option.value.value_or("");
  return tl::unexpected(
      Error(ErrorCode::usage,
            fmt::format("-readconfig {} may name sockets and files of the original VM", file))
          .with_remedy(fmt::format(
              "Give a replacement after --: -readconfig {}, if it names no monitor and nothing to "
              "listen on or to write; else one without those, and those as options.",
              file)));
}

Status LaunchRewriter::refuse_descriptors(QemuOption& option) {
  static constexpr std::array<std::string_view, 9> takes_descriptors = {
      "netdev", "net", "nic", "object", "device", "blockdev", "drive", "fsdev", "virtfs"};
  if (!option.value || !one_of(option.name, takes_descriptors)) return {};
  const OptionValue value = OptionValue::parse(*option.value, implied_key(option.name));
  std::string_view key;
  for (const std::string_view candidate : {"fd", "fds", "vhostfd", "vhostfds", "sock_fd"}) {
    if (value.has(candidate)) key = candidate;
  }
  if (value.get("addr.type") == "fd") key = "addr.str";
  if (value.get("local.type") == "fd") key = "local.str";
  if (key.empty()) return {};
  const std::string id = identity(option).value_or("");
  Error error(ErrorCode::usage, fmt::format("{} {} uses a descriptor that only the original VM had "
                                            "({}={})",
                                            option.written, id.empty() ? *option.value : id, key,
                                            value.get(key).value_or("")));
  std::string example = option.name == "netdev" ? "user" : "...";
  return tl::unexpected(std::move(error).with_remedy(
      id.empty() ? fmt::format("Change it with --replace OLD=NEW.")
                 : fmt::format("Give a replacement with the same id after --: {} {},{}={}",
                               option.written, example, identity_key(option.name), id)));
}

}  // namespace vmsnap
