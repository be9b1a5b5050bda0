// The file that `vmsnap backup --config FILE` reads: TOML, vmsnap-backup(5).
//
// A key that is not known is an error, not ignored: a misspelt one would lose
// backups, or their rule of what to keep. Every error is ErrorCode::usage and
// names file, line and key; only a file that cannot be read is ErrorCode::io.
// Nothing is looked up: neither the store nor a socket has to be there.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/error.h"
#include "formats/retention.h"
#include "snap/vmm/monitor_address.h"

namespace vmsnap {

// One [[vm]].
struct BackupVm {
  std::string name;  // for reports; the socket or domain, unless the file gives another
  MonitorAddress monitor;  // its socket is an absolute path
  TagList tags;
  bool without_disks = false;  // disks = "none"
  std::string pause_command;   // empty for none
  std::chrono::seconds pause_command_limit{10};
  std::chrono::seconds stall_limit{10};
  bool copy_pinned = false;
  std::string dedup_domain;  // empty for the store's own
  // The VM's own, else that of the whole file; none: any age is right.
  std::optional<std::chrono::seconds> max_age;
};

struct BackupConfig {
  std::string store;  // absolute path
  // At most one of these three is not empty.
  std::string key_file;            // absolute path
  std::string passphrase_file;     // absolute path
  std::string passphrase_command;  // for /bin/sh
  std::chrono::seconds lock_wait{600};
  double sample = 0.05;           // share of the store verified each run, 0 to 1
  std::optional<int> level;       // zstd, -7 to 19
  bool delta = false;             // pages are stored as deltas of similar ones
  std::optional<int> cpus;        // 1 to 256
  std::optional<uint64_t> memory;     // bytes
  std::optional<uint64_t> bandwidth;  // bytes a second
  std::optional<KeepRule> keep;   // none: nothing is pruned
  std::vector<BackupVm> vms;      // at least one, with different monitors and names
};

// At most 1 MiB. Blocks on the file.
Result<BackupConfig> read_backup_config(const std::string& path);

// `name` stands for the file in errors.
Result<BackupConfig> parse_backup_config(std::string_view text, const std::string& name);

}  // namespace vmsnap
