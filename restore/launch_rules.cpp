#include "restore/launch_rules.h"

#include <sys/un.h>

#include <algorithm>
#include <array>
#include <optional>
#include <span>

#include "restore/option_value.h"
#include "restore/qemu_options.h"

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

// The saved device state has no configuration section.
constexpr std::string_view send_configuration_off = "migration.send-configuration=off";

class Rewriter {
 public:
  explicit Rewriter(const LaunchRequest& request) : request_(request) {}

  Result<std::vector<std::string>> rewrite();

 private:
  using Rule = Status (Rewriter::*)(QemuOption&);
  struct RuleEntry {
    std::string_view option;
    Rule rule;
  };
  static const RuleEntry rules[];

  Status replace_texts(std::vector<QemuOption>& options) const;
  Status apply_rules(QemuOption& option);
  Result<std::string> socket_path(const std::string& name) const;
  std::string in_dir(const std::string& name) const { return request_.run_dir + "/" + name; }

  Status drop(QemuOption& option);
  Status drop_own_global(QemuOption& option);
  Status keep_nographic(QemuOption& option);
  Status note_nodefaults(QemuOption& option);
  Status move_serial(QemuOption& option);
  Status move_parallel(QemuOption& option);
  Status move_debugcon(QemuOption& option);
  Status move_chardev(QemuOption& option);
  Status strip_trace(QemuOption& option);
  Status strip_overcommit(QemuOption& option);
  Status strip_forwards(QemuOption& option);
  Status make_plain_memory(QemuOption& option);
  Status pin_machine(QemuOption& option);
  Status silence_audio(QemuOption& option);
  Status note_device(QemuOption& option);
  Status refuse_descriptors(QemuOption& option);
  Status refuse_add_fd(QemuOption& option);

  const LaunchRequest& request_;
  int serials_ = 0;
  int parallels_ = 0;
  bool nographic_ = false;
  bool default_serial_ = true;
  bool machine_pinned_ = false;
};

const Rewriter::RuleEntry Rewriter::rules[] = {
    {"incoming", &Rewriter::drop},
    {"loadvm", &Rewriter::drop},
    {"S", &Rewriter::drop},
    {"daemonize", &Rewriter::drop},
    {"pidfile", &Rewriter::drop},
    {"qmp", &Rewriter::drop},
    {"qmp-pretty", &Rewriter::drop},
    {"monitor", &Rewriter::drop},
    {"gdb", &Rewriter::drop},
    {"s", &Rewriter::drop},
    {"D", &Rewriter::drop},
    {"mem-path", &Rewriter::drop},
    {"mem-prealloc", &Rewriter::drop},
    {"global", &Rewriter::drop_own_global},
    {"trace", &Rewriter::strip_trace},
    {"overcommit", &Rewriter::strip_overcommit},
    {"display", &Rewriter::drop},
    {"vnc", &Rewriter::drop},
    {"spice", &Rewriter::drop},
    {"sdl", &Rewriter::drop},
    {"curses", &Rewriter::drop},
    {"full-screen", &Rewriter::drop},
    {"nographic", &Rewriter::keep_nographic},
    {"nodefaults", &Rewriter::note_nodefaults},
    {"serial", &Rewriter::move_serial},
    {"parallel", &Rewriter::move_parallel},
    {"debugcon", &Rewriter::move_debugcon},
    {"chardev", &Rewriter::move_chardev},
    {"netdev", &Rewriter::strip_forwards},
    {"nic", &Rewriter::strip_forwards},
    {"net", &Rewriter::strip_forwards},
    {"object", &Rewriter::make_plain_memory},
    {"machine", &Rewriter::pin_machine},
    {"M", &Rewriter::pin_machine},
    {"audiodev", &Rewriter::silence_audio},
    {"device", &Rewriter::note_device},
    {"add-fd", &Rewriter::refuse_add_fd},
};

Status Rewriter::drop(QemuOption& option) {
  option.dropped = true;
  return {};
}

Status Rewriter::drop_own_global(QemuOption& option) {
  // A VM that was itself restored has it already.
  option.dropped = option.value == send_configuration_off;
  return {};
}

Status Rewriter::keep_nographic(QemuOption&) {
  // It also tells the machine to have no graphics, so it must stay.
  nographic_ = true;
  return {};
}

Status Rewriter::note_nodefaults(QemuOption&) {
  default_serial_ = false;
  return {};
}

// "none" and "null" name nothing outside; "chardev:ID" moves with its -chardev.
bool names_nothing_outside(const std::optional<std::string>& value) {
  return !value || *value == "none" || *value == "null" || value->starts_with("chardev:");
}

Status Rewriter::move_serial(QemuOption& option) {
  default_serial_ = false;
  const int number = serials_++;
  if (names_nothing_outside(option.value)) return {};
  option.value = "file:" + in_dir(fmt::format("serial{}.log", number));
  return {};
}

Status Rewriter::move_parallel(QemuOption& option) {
  const int number = parallels_++;
  if (names_nothing_outside(option.value)) return {};
  option.value = "file:" + in_dir(fmt::format("parallel{}.log", number));
  return {};
}

Status Rewriter::move_debugcon(QemuOption& option) {
  if (!names_nothing_outside(option.value)) option.value = "file:" + in_dir("debugcon.log");
  return {};
}

Result<std::string> Rewriter::socket_path(const std::string& name) const {
  const std::string path = in_dir(name);
  if (path.size() >= sizeof(sockaddr_un::sun_path)) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("the socket path {} is too long ({} bytes, at most {})",
                                            path, path.size(), sizeof(sockaddr_un::sun_path) - 1))
            .with_remedy("Choose a shorter --run-dir."));
  }
  return path;
}

Status Rewriter::move_chardev(QemuOption& option) {
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

Status Rewriter::strip_trace(QemuOption& option) {
  OptionValue trace = OptionValue::parse(option.value.value_or(""), "enable");
  trace.remove("file");
  option.value = trace.text();
  option.dropped = trace.empty();
  return {};
}

Status Rewriter::strip_overcommit(QemuOption& option) {
  // Locking would fault in all of the memory before the guest may run.
  OptionValue overcommit = OptionValue::parse(option.value.value_or(""), "");
  overcommit.remove("mem-lock");
  option.value = overcommit.text();
  option.dropped = overcommit.empty();
  return {};
}

Status Rewriter::strip_forwards(QemuOption& option) {
  if (!option.value) return {};
  OptionValue network = OptionValue::parse(*option.value, "type");
  if (network.has("hostfwd") || network.has("guestfwd")) {
    network.remove("hostfwd");
    network.remove("guestfwd");
    option.value = network.text();
  }
  return {};
}

Status Rewriter::make_plain_memory(QemuOption& option) {
  if (!option.value) return {};
  OptionValue object = OptionValue::parse(*option.value, "qom-type");
  const std::string type = object.get("qom-type").value_or("");
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

Status Rewriter::pin_machine(QemuOption& option) {
  if (request_.record.machine.empty() || !option.value) return {};
  OptionValue machine = OptionValue::parse(*option.value, "type");
  if (!machine.has("type")) return {};  // only properties; the type stands elsewhere
  machine.set("type", request_.record.machine);
  option.value = machine.text();
  machine_pinned_ = true;
  return {};
}

Status Rewriter::silence_audio(QemuOption& option) {
  if (!option.value) return {};
  OptionValue audio = OptionValue::parse(*option.value, "driver");
  const auto driver = audio.get("driver");
  if (driver != "spice" && driver != "dbus") return {};
  option.value = "none,id=" + escape_commas(audio.get("id").value_or(""));
  return {};
}

Status Rewriter::note_device(QemuOption& option) {
  // A serial port given as a device stands in for the default one.
  OptionValue device = OptionValue::parse(option.value.value_or(""), "driver");
  if (device.get("driver") == "isa-serial") default_serial_ = false;
  if (device.get("driver") == "vmgenid") {
    // That is what it is for: the guest learns that this is another run.
    device.set("guid", "auto");
    option.value = device.text();
  }
  return {};
}

Status Rewriter::refuse_add_fd(QemuOption& option) {
  return tl::unexpected(
      Error(ErrorCode::usage,
            fmt::format("-add-fd {} passes a descriptor that only the original VM had",
                        option.value.value_or("")))
          .with_remedy("Give a replacement with the same set after --: -add-fd fd=N,set=M, "
                       "where N is open in the shell."));
}

Status Rewriter::refuse_descriptors(QemuOption& option) {
  static constexpr std::array<std::string_view, 9> takes_descriptors = {
      "netdev", "net", "nic", "object", "device", "blockdev", "drive", "fsdev", "virtfs"};
  if (!option.value || !one_of(option.name, takes_descriptors)) return {};
  const OptionValue value = OptionValue::parse(*option.value, implied_key(option.name));
  std::string_view key;
  for (const std::string_view candidate : {"fd", "fds", "vhostfd", "vhostfds", "sock_fd"}) {
    if (value.has(candidate)) key = candidate;
  }
  if (value.get("addr.type") == "fd") key = "addr.str";
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

Status Rewriter::apply_rules(QemuOption& option) {
  if (option.written.empty()) return {};
  VMSNAP_CHECK(refuse_descriptors(option));
  for (const RuleEntry& entry : rules) {
    if (entry.option == option.name) return (this->*entry.rule)(option);
  }
  return {};
}

Status Rewriter::replace_texts(std::vector<QemuOption>& options) const {
  for (const Replacement& replacement : request_.replacements) {
    bool found = false;
    for (QemuOption& option : options) {
      if (!option.value) continue;
      for (size_t at = 0; (at = option.value->find(replacement.from, at)) != std::string::npos;) {
        option.value->replace(at, replacement.from.size(), replacement.to);
        at += replacement.to.size();
        found = true;
      }
    }
    if (!found) {
      return tl::unexpected(
          Error(ErrorCode::usage, fmt::format("--replace {}={}: no recorded argument contains it",
                                              replacement.from, replacement.to))
              .with_remedy("--dry-run without it prints the command line."));
    }
  }
  return {};
}

Result<std::vector<std::string>> Rewriter::rewrite() {
  const std::span<const std::string> recorded(request_.record.arguments);
  std::vector<QemuOption> options = parse_qemu_options(recorded.subspan(1));
  VMSNAP_CHECK(replace_texts(options));
  std::vector<QemuOption> extra = parse_qemu_options(request_.extra);

  std::vector<std::string> arguments;
  const auto append = [&](const QemuOption& option) {
    if (!option.written.empty()) arguments.push_back(option.written);
    if (option.value) arguments.push_back(*option.value);
  };
  for (QemuOption& option : options) {
    const auto same = std::find_if(extra.begin(), extra.end(), [&](const QemuOption& other) {
      return identity(option) && other.name == option.name && identity(other) == identity(option);
    });
    if (same != extra.end()) {
      if (!same->dropped) append(*same);
      same->dropped = true;  // it has its place now
      continue;
    }
    VMSNAP_CHECK(apply_rules(option));
    if (!option.dropped) append(option);
  }

  const auto add = [&](std::initializer_list<std::string> words) {
    arguments.insert(arguments.end(), words);
  };
  if (!machine_pinned_ && !request_.record.machine.empty()) {
    add({"-machine", "type=" + request_.record.machine});
  }
  if (default_serial_) add({"-serial", "file:" + in_dir("serial0.log")});
  if (!nographic_) add({"-display", "none"});
  const std::string qmp = VMSNAP_TRY(socket_path("qmp.sock"));
  add({"-monitor", "none"});
  add({"-qmp", "unix:" + escape_commas(qmp) + ",server=on,wait=off"});
  add({"-pidfile", in_dir("qemu.pid")});
  add({"-global", std::string(send_configuration_off)});
  add({"-S", "-incoming", "defer"});
  for (const QemuOption& option : extra) {
    if (!option.dropped) append(option);
  }
  return arguments;
}

}  // namespace

Result<Replacement> parse_replacement(const std::string& text) {
  const size_t equals = text.find('=');
  if (equals == 0 || equals == std::string::npos) {
    return fail(ErrorCode::usage, "--replace wants OLD=NEW, not \"{}\"", text);
  }
  return Replacement{text.substr(0, equals), text.substr(equals + 1)};
}

Result<LaunchLine> derive_launch_line(const LaunchRequest& request) {
  if (request.record.arguments.empty()) {
    return fail(ErrorCode::damaged, "the image records no command line");
  }
  LaunchLine line;
  line.executable = request.executable.empty() ? request.record.executable : request.executable;
  line.working_directory = request.working_directory.empty() ? request.record.working_directory
                                                             : request.working_directory;
  Rewriter rewriter(request);
  line.arguments = VMSNAP_TRY(rewriter.rewrite());
  line.arguments.insert(line.arguments.begin(), line.executable);
  return line;
}

std::string shell_quoted(std::string_view argument) {
  static constexpr std::string_view plain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:=,+@%";
  if (!argument.empty() && argument.find_first_not_of(plain) == std::string_view::npos) {
    return std::string(argument);
  }
  std::string quoted = "'";
  for (const char c : argument) {
    if (c == '\'') {
      quoted += "'\\''";
    } else {
      quoted += c;
    }
  }
  return quoted + "'";
}

std::string shell_quoted(const LaunchLine& line) {
  std::string text;
  for (const std::string& argument : line.arguments) {
    if (!text.empty()) text += ' ';
    text += shell_quoted(argument);
  }
  return text;
}

}  // namespace vmsnap
