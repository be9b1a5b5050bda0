// A QEMU command line taken apart into its options. Values; nothing fails.
//
// Source: qemu(1), and qemu-options of QEMU 7.2 to 10 for which take a value.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vmsnap {

struct QemuOption {
  std::string written;               // "-netdev", as it was given; empty: a disk image alone
  std::string name;                  // "netdev"
  std::optional<std::string> value;  // of an option that takes one
  bool dropped = false;
  bool is_replacement = false;  // not recorded, but given in the place of one that was
};

// `arguments` without argv[0]. Together again, in order, they are the same.
std::vector<QemuOption> parse_qemu_options(std::span<const std::string> arguments);

// The key that the first word of an option's value stands for ("qom-type" of
// -object); empty: none.
std::string_view implied_key(std::string_view option_name);

// The key that tells one option of a kind from another ("id" of -netdev);
// empty: there is none.
std::string_view identity_key(std::string_view option_name);

// The value of that key; empty for all -readconfig.
std::optional<std::string> identity(const QemuOption& option);

}  // namespace vmsnap
