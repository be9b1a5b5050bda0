// The configuration of `vmsnap backup`: each key, each mistake, by its line.
#include "snap/backup_config.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>

#include "formats/file.h"

namespace vmsnap {
namespace {

using namespace std::chrono_literals;

constexpr const char* smallest = "store = \"/b\"\n[[vm]]\nqmp = \"/q\"\n";

// The error of a file; fails if there is none.
std::string backup_error(const std::string& text) {
  const auto parsed = parse_backup_config(text, "backup.toml");
  if (parsed) {
    ADD_FAILURE() << "was accepted:\n" << text;
    return "";
  }
  EXPECT_EQ(parsed.error().code(), ErrorCode::usage);
  EXPECT_FALSE(parsed.error().remedy().empty());
  return parsed.error().message();
}

// The error of a valid file with one more line: at the top (line 1), in [keep]
// (line 3) or in its [[vm]] (line 6).
std::string error_at_top(const std::string& line) { return backup_error(line + "\n" + smallest); }
std::string error_in_keep(const std::string& line) {
  return backup_error("store = \"/b\"\n[keep]\n" + line + "\nlast = 1\n[[vm]]\nqmp = \"/q\"\n");
}
std::string error_in_vm(const std::string& line) {
  return backup_error("store = \"/b\"\n\n\n[[vm]]\nqmp = \"/q\"\n" + line + "\n");
}

std::string tag_array(size_t count) {
  std::string text = "tags = [";
  for (size_t i = 0; i < count; ++i) text += fmt::format("\"{}\",", i);
  return text + "]";
}

TEST(BackupConfig, TheSmallestHasTheDefaults) {
  const BackupConfig config = parse_backup_config(smallest, "x").value();
  EXPECT_EQ(config.store, "/b");
  EXPECT_EQ(config.key_file + config.passphrase_file + config.passphrase_command, "");
  EXPECT_EQ(config.lock_wait, 10min);
  EXPECT_EQ(config.sample, 0.05);
  EXPECT_FALSE(config.level || config.delta || config.cpus || config.memory || config.bandwidth || config.keep);
  ASSERT_EQ(config.vms.size(), 1u);
  const BackupVm& vm = config.vms[0];
  EXPECT_EQ(vm.monitor.socket, "/q");
  EXPECT_EQ(vm.name, "/q");
  EXPECT_TRUE(vm.tags.empty());
  EXPECT_FALSE(vm.without_disks);
  EXPECT_EQ(vm.pause_command + vm.dedup_domain, "");
  EXPECT_EQ(vm.pause_command_limit, 10s);
  EXPECT_EQ(vm.stall_limit, 10s);
  EXPECT_FALSE(vm.copy_pinned);
  EXPECT_FALSE(vm.max_age);
}

TEST(BackupConfig, EveryKeyIsRead) {
  const BackupConfig config = parse_backup_config(R"(
store = "/backup/vms"
passphrase-command = """
  first
  second"""
lock-wait = "90s"
sample = "12.5%"
level = -7
delta = true
cpus = 256
memory = "512M"
bandwidth = "1.5G"
max-age = "26h"
[keep]
last = 1
hourly = 2
daily = 3
weekly = 4
monthly = 5
yearly = "unlimited"
within = "1y2m"
tags = ["a", "b,c", ""]
[[vm]]
name = "web"
qmp = "/run/web.qmp"
tags = ["nightly", "äöü"]
disks = "none"
in-pause = "lvcreate \t -s"
in-pause-limit = "5s"
stall-limit = "1m30s"
copy-pinned = true
dedup-domain = "tenant 1"
max-age = "1h"
[[vm]]
qmp = "/run/db.qmp"
)",
                                                  "x")
                                  .value();
  EXPECT_EQ(config.store, "/backup/vms");
  EXPECT_EQ(config.passphrase_command, "  first\n  second");
  EXPECT_EQ(config.lock_wait, 90s);
  EXPECT_EQ(config.sample, 0.125);
  EXPECT_EQ(config.level, -7);
  EXPECT_TRUE(config.delta);
  EXPECT_EQ(config.cpus, 256);
  EXPECT_EQ(config.memory, uint64_t{512} << 20);
  EXPECT_EQ(config.bandwidth, uint64_t{3} << 29);
  ASSERT_TRUE(config.keep);
  EXPECT_EQ(config.keep->last, 1);
  EXPECT_EQ(config.keep->hourly, 2);
  EXPECT_EQ(config.keep->daily, 3);
  EXPECT_EQ(config.keep->weekly, 4);
  EXPECT_EQ(config.keep->monthly, 5);
  EXPECT_EQ(config.keep->yearly, KeepRule::unlimited);
  EXPECT_EQ(config.keep->within, (CalendarDuration{1, 2, 0, 0}));
  EXPECT_EQ(config.keep->keep_tags, (std::vector<TagList>{{"a"}, {"b", "c"}, {}}));
  ASSERT_EQ(config.vms.size(), 2u);
  const BackupVm& vm = config.vms[0];
  EXPECT_EQ(vm.name, "web");
  EXPECT_EQ(vm.monitor.socket, "/run/web.qmp");
  EXPECT_EQ(vm.tags, TagList({"nightly", "äöü"}));
  EXPECT_TRUE(vm.without_disks);
  EXPECT_EQ(vm.pause_command, "lvcreate \t -s");
  EXPECT_EQ(vm.pause_command_limit, 5s);
  EXPECT_EQ(vm.stall_limit, 90s);
  EXPECT_TRUE(vm.copy_pinned);
  EXPECT_EQ(vm.dedup_domain, "tenant 1");
  EXPECT_EQ(vm.max_age, 1h);
  EXPECT_EQ(config.vms[1].max_age, 26h);  // that of the file

  const auto with = [](const std::string& line) {
    return parse_backup_config(line + "\n" + smallest, "x").value();
  };
  EXPECT_EQ(with("key-file = \"/k\"").key_file, "/k");
  EXPECT_EQ(with("passphrase-file = \"/p\"").passphrase_file, "/p");
  EXPECT_EQ(with("sample = \"0%\"").sample, 0);
  EXPECT_EQ(with("sample = \"100%\"").sample, 1);
}

TEST(BackupConfig, UnknownKeysAreNamedWithFileAndLine) {
  EXPECT_EQ(error_at_top("stroe = \"/c\""), "backup.toml:1: unknown key 'stroe'");
  EXPECT_EQ(error_in_keep("dayly = 7"), "backup.toml:3: unknown key 'dayly' in [keep]");
  EXPECT_EQ(error_in_vm("tag = [\"a\"]"), "backup.toml:6: unknown key 'tag' in [[vm]]");
  EXPECT_EQ(error_at_top("\"a\\nb\" = 1"), "backup.toml:1: unknown key 'a\\x0ab'");
  EXPECT_EQ(error_at_top("Store = \"/c\""), "backup.toml:1: unknown key 'Store'");
  // A misspelt key is said to be unknown, not missing.
  EXPECT_EQ(backup_error("store = \"/b\"\n[[vm]]\nqpm = \"/q\"\n"),
            "backup.toml:3: unknown key 'qpm' in [[vm]]");
  EXPECT_EQ(backup_error("stor = \"/b\"\n[[vm]]\nqmp = \"/q\"\n"), "backup.toml:1: unknown key 'stor'");
  EXPECT_EQ(backup_error(std::string(smallest) + "[kepp]\nlast = 1\n"),
            "backup.toml:4: unknown key 'kepp'");
}

TEST(BackupConfig, TopLevelKeysBelowATableAreFoundThere) {
  EXPECT_EQ(backup_error("[keep]\nlast = 1\nstore = \"/b\"\n[[vm]]\nqmp = \"/q\"\n"),
            "backup.toml:3: unknown key 'store' in [keep]");
}

TEST(BackupConfig, WhatIsMissing) {
  EXPECT_EQ(backup_error("[[vm]]\nqmp = \"/q\"\n"),
            "backup.toml:1: store is missing: the directory of the store");
  EXPECT_EQ(backup_error(""), "backup.toml:1: there is no [[vm]]: nothing to back up");
  EXPECT_EQ(backup_error("store = \"/b\""), "backup.toml:1: there is no [[vm]]: nothing to back up");
  EXPECT_EQ(backup_error("vm = []\nstore = \"/b\""),
            "backup.toml:1: there is no [[vm]]: nothing to back up");
  EXPECT_EQ(backup_error("store = \"/b\"\n\n[[vm]]\nname = \"x\"\n"),
            "backup.toml:3: [[vm]] qmp: is missing: the monitor socket of the VM; or libvirt, its domain");
}

TEST(BackupConfig, VmAndKeepAreTheRightKindOfTable) {
  EXPECT_EQ(backup_error("store = \"/b\"\n[vm]\nqmp = \"/q\"\n"),
            "backup.toml:2: each VM is written [[vm]], with two brackets");
  EXPECT_EQ(backup_error("store = \"/b\"\nvm = [1]\n"), "backup.toml:2: each VM is written [[vm]]");
  EXPECT_EQ(backup_error("keep = 7\nstore = \"/b\"\n[[vm]]\nqmp = \"/q\"\n"),
            "backup.toml:1: keep is a table: write [keep]");
}

TEST(BackupConfig, RelativePathsAreRefused) {
  const std::string reason = "is a relative path; give one that starts with /";
  EXPECT_EQ(backup_error("store = \"b\"\n[[vm]]\nqmp = \"/q\"\n"),
            "backup.toml:1: store: 'b' " + reason);
  EXPECT_EQ(backup_error("store = \"/b\"\n[[vm]]\nqmp = \"./q\"\n"),
            "backup.toml:3: [[vm]] qmp: './q' " + reason);
  EXPECT_EQ(error_at_top("key-file = \"~/k\""), "backup.toml:1: key-file: '~/k' " + reason);
  EXPECT_EQ(error_at_top("passphrase-file = \"p\""), "backup.toml:1: passphrase-file: 'p' " + reason);
}

TEST(BackupConfig, WrongTypesAndValues) {
  for (const char* line :
       {"level = 20", "level = -8", "level = \"3\"", "level = 1.5", "delta = 1",
        "delta = \"true\"", "cpus = 0", "cpus = 257", "memory = 5", "memory = \"x\"", "bandwidth = \"0\"",
        "cpus = 99999999999", "lock-wait = 10", "lock-wait = \"10\"", "lock-wait = \"0s\"",
        "lock-wait = \"1y\"", "max-age = \"-1h\"", "max-age = true", "sample = 5", "sample = \"5\"",
        "sample = \"101%\"", "sample = \"-1%\"", "sample = \"nan%\"", "sample = \"inf%\"", "sample = \"%\"",
        "sample = \"1e1%\"", "sample = \"5 %\"", "key-file = 2020-01-01", "key-file = \"\"",
        "key-file = \"/a\\u0000b\"", "key-file = \"/a\\nb\"", "passphrase-command = \"\"",
        "passphrase-command = \"a\\u0000\"", "passphrase-command = [\"a\"]"}) {
    const std::string key(line, std::string_view(line).find(' '));
    EXPECT_TRUE(error_at_top(line).starts_with("backup.toml:1: " + key + ": ")) << error_at_top(line);
  }
  for (const char* line :
       {"daily = -1", "daily = \"all\"", "daily = \"7\"", "daily = 7.0", "daily = 1000000001",
        "daily = 99999999999999999999", "within = \"90s\"", "within = 7", "within = \"0d\"",
        "tags = \"a\"", "tags = [1]", "tags = [[\"a\"]]"}) {
    const std::string key(line, std::string_view(line).find(' '));
    const std::string error = error_in_keep(line);
    EXPECT_TRUE(error.starts_with("backup.toml:3: [keep] " + key + ": ") ||
                error.starts_with("backup.toml:3: Error while parsing"))
        << error;
  }
  for (const char* line :
       {"disks = \"all\"", "disks = true", "disks = \"\"", "tags = \"a\"", "tags = [\"\"]",
        "tags = [\"a,b\"]", "tags = [\"a\", 2]", "tags = [\"a\\n\"]", "in-pause = 1",
        "in-pause-limit = \"25h\"", "in-pause-limit = 10", "stall-limit = \"2d\"", "copy-pinned = 1", "name = \"\"",
        "name = \"a\\tb\"", "dedup-domain = [\"a\"]", "max-age = \"1w\""}) {
    const std::string key(line, std::string_view(line).find(' '));
    EXPECT_TRUE(error_in_vm(line).starts_with("backup.toml:6: [[vm]] " + key + ": "))
        << error_in_vm(line);
  }
}

TEST(BackupConfig, AKeepThatKeepsNothingIsRefused) {
  const std::string reason = "[keep]: a rule that keeps nothing would remove every snapshot";
  EXPECT_EQ(backup_error("store = \"/b\"\n[[vm]]\nqmp = \"/q\"\n[keep]\n"), "backup.toml:4: " + reason);
  EXPECT_EQ(backup_error("store = \"/b\"\n[[vm]]\nqmp = \"/q\"\n[keep]\ndaily = 0\ntags = []\n"),
            "backup.toml:4: " + reason);
}

TEST(BackupConfig, KeysOfAStoreExcludeEachOther) {
  EXPECT_NE(error_at_top("key-file = \"/k\"\npassphrase-file = \"/p\"").find("exclude each other"),
            std::string::npos);
  EXPECT_NE(error_at_top("passphrase-command = \"k\"\npassphrase-file = \"/p\"").find("exclude each other"),
            std::string::npos);
}

TEST(BackupConfig, TheSameVmTwiceIsRefused) {
  const std::string vm1 = "store = \"/b\"\n[[vm]]\nqmp = \"/run/q\"\n";
  EXPECT_EQ(backup_error(vm1 + "[[vm]]\nname = \"other\"\nqmp = \"/run/q\"\n"),
            "backup.toml:4: [[vm]]: QMP socket /run/q is there twice");
  EXPECT_EQ(backup_error(vm1 + "[[vm]]\nname = \"other\"\nqmp = \"/run/./x/..//q\"\n"),
            "backup.toml:4: [[vm]]: QMP socket /run/./x/..//q is there twice");
  EXPECT_EQ(backup_error(vm1 + "[[vm]]\nname = \"/run/q\"\nqmp = \"/run/r\"\n"),
            "backup.toml:4: [[vm]] name: '/run/q' is there twice");
}

TEST(BackupConfig, VmsOfLibvirt) {
  const std::string store = "store = \"/b\"\n";
  const auto config = parse_backup_config(
      store + "[[vm]]\nlibvirt = \"web\"\n"
              "[[vm]]\nlibvirt = \"web\"\nconnect = \"qemu:///session\"\nname = \"mine\"\n",
      "x");
  ASSERT_TRUE(config) << config.error().message();
  EXPECT_EQ(config->vms[0].monitor, MonitorAddress::of_domain("web", ""));
  EXPECT_EQ(config->vms[0].name, "web");
  EXPECT_EQ(config->vms[1].monitor, MonitorAddress::of_domain("web", "qemu:///session"));
  EXPECT_EQ(backup_error(store + "[[vm]]\nlibvirt = \"web\"\n[[vm]]\nlibvirt = \"web\"\nname = \"x\"\n"),
            "backup.toml:4: [[vm]]: libvirt domain 'web' is there twice");
  EXPECT_EQ(backup_error(store + "[[vm]]\nlibvirt = \"web\"\nqmp = \"/q\"\n"),
            "backup.toml:3: [[vm]] libvirt: cannot be beside qmp");
  EXPECT_EQ(backup_error(store + "[[vm]]\nqmp = \"/q\"\nconnect = \"qemu:///system\"\n"),
            "backup.toml:4: [[vm]] connect: is for libvirt domains");
}

TEST(BackupConfig, WhatIsNoToml) {
  for (const char* text : {"store", "store = ", "store = \"/b", "store = /b", "store = \"/a\"\nstore = \"/b\"",
                           "[keep\n", "[[[vm]]]", "[[=", "vm = [}", "store = \"\xff\"", "\x01", "store = \"\\q\""}) {
    EXPECT_TRUE(backup_error(text).starts_with("backup.toml:")) << text;
  }
  EXPECT_TRUE(backup_error("store = \"/b\"\n[[vm]]\nqmp = \"/q\"\nqmp = \"/r\"\n").starts_with("backup.toml:4: "));
}

TEST(BackupConfig, EveryLengthIsBounded) {
  const auto quoted = [](size_t size) { return fmt::format("\"/{:x<{}}\"", "", size - 1); };
  EXPECT_TRUE(parse_backup_config(fmt::format("store = {}\n[[vm]]\nqmp = {}\n", quoted(4000), quoted(107)), "x"));
  EXPECT_NE(backup_error("store = \"/b\"\n[[vm]]\nqmp = " + quoted(108)).find("107"), std::string::npos);
  // The tag that a name becomes is as long as a tag can be.
  EXPECT_TRUE(parse_backup_config(std::string(smallest) + "name = " + quoted(248), "x"));
  EXPECT_NE(error_in_vm("name = " + quoted(249)).find("248"), std::string::npos);
  EXPECT_NE(error_in_vm("tags = [" + quoted(256) + "]").find("255"), std::string::npos);
  EXPECT_NE(error_in_vm("dedup-domain = " + quoted(256)).find("255"), std::string::npos);
  EXPECT_TRUE(parse_backup_config(std::string(smallest) + tag_array(63), "x"));
  EXPECT_NE(error_in_vm(tag_array(64)).find("at most 63"), std::string::npos);
  std::string command = "in-pause = \"\"\"";
  for (int i = 0; i < 50; ++i) command += fmt::format("{:x<90}\n", "");
  EXPECT_NE(error_in_vm(command + "\"\"\"").find("at most 4096 bytes"), std::string::npos);

  EXPECT_TRUE(parse_backup_config(smallest + ("#" + std::string(4095, 'x')), "x"));
  EXPECT_EQ(backup_error(smallest + ("#" + std::string(4096, 'x'))),
            "backup.toml:4: the line has more than 4096 bytes");
  std::string comments = smallest;
  while (comments.size() < (1 << 20)) comments += "#" + std::string(1000, 'x') + "\n";
  EXPECT_EQ(backup_error(comments), "backup.toml:1: the file has more than 1048576 bytes");
}

TEST(BackupConfig, TenThousandVmsAndNoMore) {
  std::string text = "store = \"/b\"\n";
  for (int i = 0; i < 10000; ++i) text += fmt::format("[[vm]]\nqmp = \"/q{}\"\n", i);
  const auto parsed = parse_backup_config(text, "x");
  ASSERT_TRUE(parsed) << parsed.error().message();
  EXPECT_EQ(parsed->vms.size(), 10000u);
  EXPECT_EQ(parsed->vms.back().monitor.socket, "/q9999");
  EXPECT_NE(backup_error(text + "[[vm]]\nqmp = \"/q\"\n").find("more than 10000 VMs"), std::string::npos);
}

// The parser's tables are destroyed by recursion: no file may nest them until
// the stack is used up.
TEST(BackupConfig, DeepNestingIsAnError) {
  std::string dots;
  for (int i = 0; i < 2000; ++i) dots += "a.";
  std::string text = "[" + dots + "a]\n" + dots + "b = ";
  for (int i = 0; i < 100; ++i) text += "[{" + dots + "c = \n";
  backup_error(text);
  backup_error("[" + dots + "a]\n" + dots + "b = [{" + dots + "c = {" + dots + "d = 1}}]\n");
  backup_error("x = " + std::string(4000, '['));
}

TEST(BackupConfig, TheShippedExampleIsAccepted) {
  const auto config = read_backup_config(VMSNAP_SOURCE_DIR "/man/examples/backup.toml");
  ASSERT_TRUE(config) << config.error().message();
  ASSERT_EQ(config->vms.size(), 2u);
  EXPECT_EQ(config->vms[1].name, "database");
  EXPECT_EQ(config->keep->yearly, KeepRule::unlimited);
}

TEST(BackupConfig, FilesThatCannotBeRead) {
  const auto absent = read_backup_config("/nonexistent/backup.toml");
  ASSERT_FALSE(absent);
  EXPECT_EQ(absent.error().code(), ErrorCode::io);

  std::string folder = std::filesystem::temp_directory_path() / "vmsnap-test-XXXXXX";
  ASSERT_TRUE(::mkdtemp(folder.data()));
  const std::string path = folder + "/backup.toml";
  ASSERT_TRUE(write_small_file(path, std::string((1 << 20) + 1, '#')));
  const auto large = read_backup_config(path);
  ASSERT_FALSE(large);
  EXPECT_EQ(large.error().code(), ErrorCode::usage);  // not "damaged": that is for stores
  ASSERT_TRUE(write_small_file(path, smallest));
  EXPECT_TRUE(read_backup_config(path));
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace vmsnap
