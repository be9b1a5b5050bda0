// The rules of launch_rules.h, one option at a time. Only launch_rules.cpp uses
// this: a rule changes the option that it is given, or drops it, and notes what
// the end of the line must know.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "restore/launch_rules.h"
#include "restore/qemu_options.h"

namespace vmsnap {

// The saved device state has no configuration section.
inline constexpr std::string_view send_configuration_off = "migration.send-configuration=off";

class LaunchRewriter {
 public:
  explicit LaunchRewriter(const LaunchRequest& request) : request_(request) {}

  Result<std::vector<std::string>> rewrite();

 private:
  using Rule = Status (LaunchRewriter::*)(QemuOption&);
  struct RuleEntry {
    std::string_view option;
    Rule rule;
  };
  static std::span<const RuleEntry> rules();

  Status replace_texts(std::vector<QemuOption>& options) const;
  Status apply_rules(QemuOption& option);
  Status drop_what_nothing_names(std::vector<QemuOption>& options,
                                 const std::vector<QemuOption>& extra);
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
  Status detach_network(QemuOption& option);
  Status move_recording(QemuOption& option);
  Status detach_object(QemuOption& option);
  Status let_overlays_have_backing(QemuOption& option);
  Status pin_machine(QemuOption& option);
  Status silence_audio(QemuOption& option);
  Status detach_device(QemuOption& option);
  Status refuse_descriptors(QemuOption& option);
  Status refuse_add_fd(const QemuOption& option) const;
  Status refuse_config_file(QemuOption& option);

  const LaunchRequest& request_;
  int serials_ = 0;
  int parallels_ = 0;
  int networks_ = 0;
  bool nographic_ = false;
  bool default_serial_ = true;
  bool machine_pinned_ = false;
};

}  // namespace vmsnap
