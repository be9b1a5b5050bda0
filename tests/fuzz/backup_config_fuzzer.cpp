// Any bytes as the configuration of a backup. What is accepted can be acted
// upon: there is a store, each VM has a socket of its own, something is kept.
#include <cstdlib>
#include <set>
#include <string_view>

#include "snap/backup_config.h"

using namespace vmsnap;

namespace {

void require_config(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto config = parse_backup_config(text, "backup.toml");
  if (!config) {
    require_config(config.error().code() == ErrorCode::usage);
    require_config(config.error().message().starts_with("backup.toml:"));
    return 0;
  }
  require_config(config->store.starts_with('/'));
  require_config(config->sample >= 0 && config->sample <= 1);
  require_config(config->lock_wait.count() > 0);
  require_config(!config->keep || check_keep_rule(*config->keep));
  require_config(!config->vms.empty());
  std::set<MonitorAddress> monitors;
  std::set<std::string> names;
  for (const BackupVm& vm : config->vms) {
    const std::string& socket = vm.monitor.socket;
    require_config(vm.monitor.is_libvirt() ? !vm.monitor.domain.empty()
                                           : socket.starts_with('/') && socket.size() <= 107);
    require_config(monitors.insert(vm.monitor).second && names.insert(vm.name).second);
    require_config(vm.stall_limit.count() > 0 && vm.pause_command_limit.count() > 0);
    require_config(vm.pause_command.find('\0') == std::string::npos);
  }
  return 0;
}
