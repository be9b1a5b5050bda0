#include "restore/qemu_options.h"

#include <algorithm>
#include <array>

#include "restore/option_value.h"

namespace vmsnap {

namespace {

// Every option that takes no value. All others do, whatever the next word
// looks like (-append "-x" is a kernel argument).
// clang-format off
constexpr auto options_without_value = std::to_array<std::string_view>({
    "S", "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "curses", "daemonize",
    "enable-fips", "enable-kvm", "enable-sync-profile", "full-screen", "h", "help", "jitdump",
    "mem-prealloc",
    "no-acpi", "no-fd-bootchk", "no-hpet", "no-quit", "no-reboot", "no-shutdown", "no-user-config",
    "nodefaults", "nographic", "old-param", "only-migratable", "perfmap", "portrait", "preconfig", "s", "sdl",
    "semihosting", "singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach",
    "xen-domid-restrict"});
// clang-format on

constexpr auto options_with_id = std::to_array<std::string_view>(
    {"netdev", "chardev", "device", "drive", "object", "audiodev", "fsdev", "tpmdev"});

template <size_t N>
bool one_of(std::string_view text, const std::array<std::string_view, N>& list) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

}  // namespace

std::vector<QemuOption> parse_qemu_options(std::span<const std::string> arguments) {
  std::vector<QemuOption> options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& word = arguments[i];
    QemuOption option;
    if (word.size() < 2 || word[0] != '-') {
      option.value = word;
    } else {
      option.written = word;
      option.name = word.substr(word.starts_with("--") ? 2 : 1);
      const bool takes_value = !one_of(option.name, options_without_value);
      if (takes_value && i + 1 < arguments.size()) option.value = arguments[++i];
    }
    options.push_back(std::move(option));
  }
  return options;
}

std::string_view implied_key(std::string_view name) {
  if (name == "object") return "qom-type";
  if (name == "chardev") return "backend";
  if (name == "netdev" || name == "net" || name == "nic") return "type";
  if (name == "machine" || name == "M" || name == "tpmdev") return "type";
  if (name == "device" || name == "blockdev" || name == "audiodev" || name == "audio") return "driver";
  if (name == "fsdev" || name == "virtfs") return "fsdriver";
  if (name == "trace") return "enable";
  if (name == "icount") return "shift";
  if (name == "drive") return "file";
  return "";
}

std::string_view identity_key(std::string_view name) {
  if (one_of(name, options_with_id)) return "id";
  if (name == "blockdev") return "node-name";
  if (name == "add-fd") return "set";
  return "";
}

std::optional<std::string> identity(const QemuOption& option) {
  // They have no names: one stands for all of them.
  if (option.name == "readconfig" && option.value) return "";
  const std::string_view key = identity_key(option.name);
  if (key.empty() || !option.value) return std::nullopt;
  return OptionValue::parse(*option.value, implied_key(option.name)).get(key);
}

}  // namespace vmsnap
