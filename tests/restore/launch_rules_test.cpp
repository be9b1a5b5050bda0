// One test for each rule in restore/launch_rules.h.
#include "restore/launch_rules.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace vmsnap {
namespace {

using Words = std::vector<std::string>;

LaunchRequest request(Words recorded, Words extra = {}) {
  LaunchRequest request;
  request.record.executable = "/usr/bin/qemu-system-x86_64";
  request.record.working_directory = "/vms";
  request.record.arguments = std::move(recorded);
  request.record.arguments.insert(request.record.arguments.begin(), "qemu");
  request.run_dir = "/run/d";
  request.extra = std::move(extra);
  return request;
}

// The derived arguments without argv[0] and without what is always added.
Words derive(Words recorded, Words extra = {}) {
  // So that no serial port and no display is added.
  recorded.insert(recorded.begin(), {"-nodefaults", "-nographic"});
  auto line = derive_launch_line(request(std::move(recorded), std::move(extra)));
  if (!line) return {"error: " + line.error().message(), line.error().remedy()};
  const Words ours = {"-monitor", "none",
                      "-qmp",     "unix:/run/d/qmp.sock,server=on,wait=off",
                      "-pidfile", "/run/d/qemu.pid",
                      "-global",  "migration.send-configuration=off",
                      "-S",       "-incoming",
                      "defer"};
  Words words(line->arguments.begin() + 3, line->arguments.end());
  const auto at = std::search(words.begin(), words.end(), ours.begin(), ours.end());
  if (at == words.end()) return {"our own arguments are not all there"};
  words.erase(at, at + static_cast<ptrdiff_t>(ours.size()));
  return words;
}

Words derive_bare(Words recorded) {
  auto line = derive_launch_line(request(std::move(recorded)));
  return line ? line->arguments : Words{line.error().message()};
}

bool contains(const Words& words, const Words& part) {
  return std::search(words.begin(), words.end(), part.begin(), part.end()) != words.end();
}

TEST(LaunchRules, TheWholeLine) {
  auto line = derive_launch_line(request({"-m", "128", "disk.img"}, {"-snapshot"}));
  ASSERT_TRUE(line);
  EXPECT_EQ(line->executable, "/usr/bin/qemu-system-x86_64");
  EXPECT_EQ(line->working_directory, "/vms");
  EXPECT_EQ(shell_quoted(*line),
            "/usr/bin/qemu-system-x86_64 -m 128 disk.img -serial file:/run/d/serial0.log "
            "-display none -monitor none -qmp unix:/run/d/qmp.sock,server=on,wait=off "
            "-pidfile /run/d/qemu.pid -global migration.send-configuration=off "
            "-S -incoming defer -snapshot");
}

TEST(LaunchRules, OthersExecutableAndDirectory) {
  LaunchRequest other = request({});
  other.executable = "/opt/qemu";
  other.working_directory = "/elsewhere";
  const auto line = derive_launch_line(other);
  ASSERT_TRUE(line);
  EXPECT_EQ(line->executable, "/opt/qemu");
  EXPECT_EQ(line->arguments[0], "/opt/qemu");
  EXPECT_EQ(line->working_directory, "/elsewhere");
}

TEST(LaunchRules, ARecordWithoutArguments) {
  LaunchRequest empty = request({});
  empty.record.arguments.clear();
  const auto line = derive_launch_line(empty);
  ASSERT_FALSE(line);
  EXPECT_EQ(line.error().code(), ErrorCode::damaged);
  EXPECT_EQ(line.error().message(), "the image records no command line");
}

TEST(LaunchRules, WhatConcernsTheOriginalAloneIsDropped) {
  EXPECT_EQ(derive({"-incoming", "defer", "-m", "1G"}), (Words{"-m", "1G"}));
  EXPECT_EQ(derive({"-loadvm", "snap1"}), Words{});
  EXPECT_EQ(derive({"-S", "-daemonize", "-s"}), Words{});
  EXPECT_EQ(derive({"--daemonize"}), Words{});
  EXPECT_EQ(derive({"-pidfile", "/var/run/q.pid"}), Words{});
  EXPECT_EQ(derive({"-qmp", "unix:/q,server=on", "-qmp-pretty", "stdio"}), Words{});
  EXPECT_EQ(derive({"-monitor", "stdio"}), Words{});
  EXPECT_EQ(derive({"-gdb", "tcp::1234"}), Words{});
  EXPECT_EQ(derive({"-qtest", "unix:/old", "-qtest-log", "/dev/null"}), Words{});
  EXPECT_EQ(derive({"-D", "/var/log/q.log", "-d", "int"}), (Words{"-d", "int"}));
  EXPECT_EQ(derive({"-mem-path", "/dev/hugepages", "-mem-prealloc"}), Words{});
}

TEST(LaunchRules, OfARestoredVmOurOwnArgumentsDoNotPileUp) {
  const Words once = derive_bare({"-m", "64"});
  const Words twice = derive_bare(Words(once.begin() + 1, once.end()));
  EXPECT_EQ(once.size(), twice.size());
  EXPECT_EQ(derive({"-global", "migration.send-configuration=off", "-global", "a.b=c"}),
            (Words{"-global", "a.b=c"}));
}

TEST(LaunchRules, TraceKeepsItsEventsNotItsFile) {
  EXPECT_EQ(derive({"-trace", "events=/e,file=/t"}), (Words{"-trace", "events=/e"}));
  EXPECT_EQ(derive({"-trace", "file=/t"}), Words{});
  EXPECT_EQ(derive({"-trace", "qio*"}), (Words{"-trace", "qio*"}));
}

TEST(LaunchRules, NothingIsLockedInMemory) {
  EXPECT_EQ(derive({"-overcommit", "mem-lock=on"}), Words{});
  EXPECT_EQ(derive({"-overcommit", "mem-lock=on,cpu-pm=on"}), (Words{"-overcommit", "cpu-pm=on"}));
}

TEST(LaunchRules, MemoryBackendsBecomePlain) {
  EXPECT_EQ(
      derive({"-object",
              "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/x,share=on,"
              "prealloc=on,host-nodes=0,policy=bind,merge=off"}),
      (Words{"-object", "memory-backend-ram,id=m,size=1G,host-nodes=0,policy=bind,merge=off"}));
  EXPECT_EQ(derive({"-object",
                    "qom-type=memory-backend-memfd,id=m,size=1G,hugetlb=on,"
                    "hugetlbsize=2M,seal=off"}),
            (Words{"-object", "qom-type=memory-backend-ram,id=m,size=1G"}));
  EXPECT_EQ(derive({"-object", "memory-backend-ram,id=m,size=1G,share=on,prealloc=yes"}),
            (Words{"-object", "memory-backend-ram,id=m,size=1G"}));
  EXPECT_EQ(
      derive({"-object", R"({"qom-type":"memory-backend-memfd","id":"pc.ram",)"
                         R"("x-use-canonical-path-for-ramblock-id":false,"share":true,)"
                         R"("prealloc":true,"size":1073741824})"}),
      (Words{"-object", R"({"qom-type":"memory-backend-ram","id":"pc.ram",)"
                        R"("x-use-canonical-path-for-ramblock-id":false,"size":1073741824})"}));
  EXPECT_EQ(derive({"-object", "rng-random,id=r,filename=/dev/urandom"}),
            (Words{"-object", "rng-random,id=r,filename=/dev/urandom"}));
}

TEST(LaunchRules, TheMachineIsPinned) {
  LaunchRequest pinned = request({"-nodefaults", "-nographic", "-M", "pc,accel=kvm,usb=off"});
  pinned.record.machine = "pc-i440fx-7.2";
  EXPECT_TRUE(
      contains(derive_launch_line(pinned)->arguments, {"-M", "pc-i440fx-7.2,accel=kvm,usb=off"}));
  pinned.record.arguments = {"qemu", "-machine", "accel=tcg", "-machine", "type=q35"};
  pinned.record.machine = "pc-q35-7.2";
  const Words words = derive_launch_line(pinned)->arguments;
  EXPECT_TRUE(contains(words, {"-machine", "accel=tcg", "-machine", "type=pc-q35-7.2"}));
  pinned.record.arguments = {"qemu", "-machine", "memory-backend=m"};
  EXPECT_TRUE(contains(derive_launch_line(pinned)->arguments, {"-machine", "memory-backend=m"}));
  EXPECT_TRUE(contains(derive_launch_line(pinned)->arguments, {"-machine", "type=pc-q35-7.2"}));
  EXPECT_EQ(derive({"-M", "pc"}), (Words{"-M", "pc"})) << "nothing recorded";
}

TEST(LaunchRules, SerialPortsGoToFiles) {
  EXPECT_EQ(derive({"-serial", "mon:stdio", "-serial", "none", "-serial", "unix:/s,server=on",
                    "-serial", "chardev:c", "-serial", "null"}),
            (Words{"-serial", "file:/run/d/serial0.log", "-serial", "none", "-serial",
                   "file:/run/d/serial2.log", "-serial", "chardev:c", "-serial", "null"}));
  EXPECT_TRUE(contains(derive_bare({"-m", "64"}), {"-serial", "file:/run/d/serial0.log"}));
  EXPECT_FALSE(contains(derive_bare({"-nodefaults"}), {"-serial"}));
  EXPECT_FALSE(contains(derive_bare({"-device", "isa-serial,chardev=c"}), {"-serial"}));
  EXPECT_EQ(derive({"-parallel", "/dev/lp0", "-parallel", "none"}),
            (Words{"-parallel", "file:/run/d/parallel0.log", "-parallel", "none"}));
  EXPECT_EQ(derive({"-debugcon", "stdio"}), (Words{"-debugcon", "file:/run/d/debugcon.log"}));
}

TEST(LaunchRules, NoDisplayIsOpened) {
  for (const Words& display :
       {Words{"-display", "gtk"}, Words{"-vnc", ":1"}, Words{"-spice", "port=5900"}, Words{"-sdl"},
        Words{"-curses"}, Words{"-full-screen"}, Words{}}) {
    const Words words = derive_bare(display);
    EXPECT_TRUE(contains(words, {"-display", "none"}));
    for (const std::string& word : display) {
      EXPECT_TRUE(word == "-display" || !contains(words, {word})) << word;
    }
  }
  EXPECT_FALSE(contains(derive_bare({"-nographic"}), {"-display"}));
  EXPECT_TRUE(contains(derive_bare({"-nographic"}), {"-nographic"}));
  EXPECT_EQ(derive({"-audiodev", "spice,id=a"}), (Words{"-audiodev", "none,id=a"}));
  EXPECT_EQ(derive({"-audiodev", R"({"id":"a","driver":"spice"})"}),
            (Words{"-audiodev", "none,id=a"}));
  EXPECT_EQ(derive({"-audiodev", "wav,id=a,path=/x.wav"}), (Words{"-audiodev", "none,id=a"}));
  EXPECT_EQ(derive({"-audio", "wav,model=hda,path=/x.wav"}), (Words{"-audio", "none,model=hda"}));
  EXPECT_EQ(derive({"-audiodev", "pa,id=a"}), (Words{"-audiodev", "pa,id=a"}));
}

TEST(LaunchRules, CharacterDevicesMove) {
  const auto chardev = [](const char* value) { return derive({"-chardev", value}); };
  EXPECT_EQ(chardev("socket,id=c,path=/x,server=on,wait=off"),
            (Words{"-chardev", "socket,id=c,path=/run/d/c.sock,server=on,wait=off"}));
  EXPECT_EQ(chardev("socket,id=c,fd=35,server=on"),
            (Words{"-chardev", "socket,id=c,path=/run/d/c.sock,server=on,wait=off"}));
  EXPECT_EQ(chardev("udp,id=c,port=1"), chardev("pty,id=c"));
  EXPECT_EQ(chardev("file,id=c,path=/x,logfile=/y"),
            (Words{"-chardev", "file,id=c,path=/run/d/c.log"}));
  EXPECT_EQ(chardev("stdio,mux=on,id=c,signal=off"),
            (Words{"-chardev", "file,id=c,path=/run/d/c.log,mux=on"}));
  EXPECT_EQ(chardev("pipe,id=c,path=/x"), (Words{"-chardev", "file,id=c,path=/run/d/c.log"}));
  EXPECT_EQ(chardev("spicevmc,id=c,name=vdagent"), (Words{"-chardev", "null,id=c"}));
  EXPECT_EQ(chardev("serial,id=c,path=/dev/ttyS0"), (Words{"-chardev", "null,id=c"}));
  EXPECT_EQ(chardev("ringbuf,id=c,size=64,logfile=/y"),
            (Words{"-chardev", "ringbuf,id=c,size=64"}));
  EXPECT_EQ(chardev(R"({"id":"c","backend":{"type":"socket","data":{"addr":{"type":"fd"}}}})"),
            (Words{"-chardev", "socket,id=c,path=/run/d/c.sock,server=on,wait=off"}));
  EXPECT_EQ(chardev("file,id=../../etc/x,path=/y"),
            (Words{"-chardev", "file,id=../../etc/x,path=/run/d/_.._.._etc_x.log"}));
}

TEST(LaunchRules, ASettingIsOfTheOptionThatItNames) {
  EXPECT_EQ(derive({"-chardev", "socket,id=a,path=/old", "-set", "chardev.a.path=/older"}),
            (Words{"-chardev", "socket,id=a,path=/run/d/a.sock,server=on,wait=off"}));
  EXPECT_EQ(derive({"-device", "e1000,id=n", "-set", "device.n.mac=00:11:22:33:44:55"}),
            (Words{"-device", "e1000,id=n,mac=00:11:22:33:44:55"}));
  EXPECT_EQ(derive({"-drive", "id=d,file=a", "-set", "drive.d.file=b,c=d"}),
            (Words{"-drive", "id=d,file=b,,c=d"}));
  // Of none, it is QEMU's to say so.
  for (const std::string& odd : {"chardev.b.path=/x", "device", "device.x", "device.a.b", "a.=.", ""}) {
    const Words line = {"-chardev", "null,id=a", "-set", odd};
    EXPECT_EQ(derive(line), line);
  }
}

TEST(LaunchRules, ASocketPathThatIsTooLong) {
  LaunchRequest deep = request({});
  deep.run_dir = "/" + std::string(100, 'd');
  const auto line = derive_launch_line(deep);
  ASSERT_FALSE(line);
  EXPECT_EQ(line.error().code(), ErrorCode::usage);
  EXPECT_EQ(line.error().message(),
            "the socket path " + deep.run_dir + "/qmp.sock is too long (110 bytes, at most 107)");
  EXPECT_EQ(line.error().remedy(), "Choose a shorter --run-dir.");
}

TEST(LaunchRules, ACommaInTheDirectory) {
  LaunchRequest odd = request({"-chardev", "file,id=c,path=/x"});
  odd.run_dir = "/a,b";
  const Words words = derive_launch_line(odd)->arguments;
  EXPECT_TRUE(contains(words, {"-chardev", "file,id=c,path=/a,,b/c.log"}));
  EXPECT_TRUE(contains(words, {"-qmp", "unix:/a,,b/qmp.sock,server=on,wait=off"}));
  EXPECT_TRUE(contains(words, {"-pidfile", "/a,b/qemu.pid"}));
}

TEST(LaunchRules, ForwardedPortsAreDropped) {
  EXPECT_EQ(derive({"-netdev", "user,id=n,hostfwd=tcp::22-:22,hostfwd=tcp::80-:80,net=10.0.0.0/8"}),
            (Words{"-netdev", "user,id=n,net=10.0.0.0/8"}));
  EXPECT_EQ(derive({"-nic", "user,guestfwd=tcp:1-cmd:x"}), (Words{"-nic", "user"}));
  EXPECT_EQ(derive({"-net", "user,hostfwd=tcp::1-:1", "-net", "nic"}),
            (Words{"-net", "user", "-net", "nic"}));
  EXPECT_EQ(derive({"-netdev", R"({"type":"user","id":"n","hostfwd":[{"str":"tcp::1-:1"}]})"}),
            (Words{"-netdev", R"({"type":"user","id":"n"})"}));
}

TEST(LaunchRules, SocketsOfNetworksMove) {
  const auto netdev = [](const char* value) { return derive({"-netdev", value}); };
  EXPECT_EQ(netdev("stream,id=n,server=on,addr.type=unix,addr.path=/x"),
            (Words{"-netdev",
                   "stream,id=n,server=on,addr.type=unix,addr.path=/run/d/net-n.sock"}));
  EXPECT_EQ(netdev("dgram,id=n,local.type=unix,local.path=/x,remote.type=unix,remote.path=/y"),
            (Words{"-netdev", "dgram,id=n,local.type=unix,local.path=/run/d/net-n.sock,"
                              "remote.type=unix,remote.path=/y"}));
  EXPECT_EQ(netdev(R"({"type":"stream","id":"n","server":true,"addr":{"type":"unix","path":"/x"}})"),
            (Words{"-netdev", R"({"type":"stream","id":"n","server":true,)"
                              R"("addr":{"type":"unix","path":"/run/d/net-n.sock"}})"}));
  for (const char* connects :
       {"stream,id=n,server=off,addr.type=unix,addr.path=/x", "stream,id=n,addr.type=unix,addr.path=/x",
        "stream,id=n,server=on,addr.type=inet,addr.host=h,addr.port=1",
        R"({"type":"stream","id":"n","server":false,"addr":{"type":"unix","path":"/x"}})"}) {
    EXPECT_EQ(netdev(connects), (Words{"-netdev", connects}));
  }
  EXPECT_EQ(derive({"-nic", "stream,server=on,addr.type=unix,addr.path=/x", "-nic",
                    "stream,server=on,addr.type=unix,addr.path=/y"}),
            (Words{"-nic", "stream,server=on,addr.type=unix,addr.path=/run/d/net-0.sock", "-nic",
                   "stream,server=on,addr.type=unix,addr.path=/run/d/net-1.sock"}));
}

TEST(LaunchRules, FilesThatTheOriginalWrites) {
  EXPECT_EQ(derive({"-object", "filter-dump,id=f,netdev=n,file=/x.pcap,maxlen=99"}),
            (Words{"-object", "filter-dump,id=f,netdev=n,file=/dev/null,maxlen=99"}));
  EXPECT_EQ(derive({"-object", R"({"qom-type":"filter-dump","id":"f","file":"/x"})"}),
            (Words{"-object", R"({"qom-type":"filter-dump","id":"f","file":"/dev/null"})"}));
  EXPECT_EQ(derive({"-device", "usb-mouse,pcap=/x.pcap,id=m"}),
            (Words{"-device", "usb-mouse,id=m"}));
  EXPECT_EQ(derive({"-device", R"({"driver":"usb-mouse","pcap":"/x.pcap"})"}),
            (Words{"-device", R"({"driver":"usb-mouse"})"}));
  EXPECT_EQ(derive({"-icount", "7,rr=record,rrfile=/x,rrsnapshot=s"}),
            (Words{"-icount", "7,rr=record,rrfile=/run/d/replay.bin,rrsnapshot=s"}));
  for (const char* reads : {"shift=auto", "7,rr=replay,rrfile=/x"}) {
    EXPECT_EQ(derive({"-icount", reads}), (Words{"-icount", reads}));
  }
}

TEST(LaunchRules, AConfigurationFileIsReplacedOrAnError) {
  EXPECT_EQ(derive({"-readconfig", "/x.cfg"}),
            (Words{"error: -readconfig /x.cfg may name sockets and files of the original VM",
                   "Give a replacement after --: -readconfig /x.cfg, if it names no monitor and "
                   "nothing to listen on or to write; else one without those, and those as "
                   "options."}));
  EXPECT_EQ(derive({"-readconfig", "/x.cfg", "-m", "1G", "-readconfig", "/y.cfg"},
                   {"-readconfig", "/z.cfg"}),
            (Words{"-readconfig", "/z.cfg", "-m", "1G"}));
}

TEST(LaunchRules, InheritedDescriptorsAreAnError) {
  EXPECT_EQ(
      derive({"-netdev", "tap,fd=36,id=hostnet0,vhost=on"}),
      (Words{"error: -netdev hostnet0 uses a descriptor that only the original VM had (fd=36)",
             "Give a replacement with the same id after --: -netdev user,id=hostnet0"}));
  EXPECT_EQ(derive({"-netdev", R"({"type":"tap","fds":"3:4","id":"n"})"})[0],
            "error: -netdev n uses a descriptor that only the original VM had (fds=3:4)");
  EXPECT_EQ(derive({"-device", R"({"driver":"vhost-vsock-pci","id":"v","vhostfd":"38"})"})[0],
            "error: -device v uses a descriptor that only the original VM had (vhostfd=38)");
  EXPECT_EQ(derive({"-netdev", "stream,id=n,addr.type=fd,addr.str=5"})[0],
            "error: -netdev n uses a descriptor that only the original VM had (addr.str=5)");
  EXPECT_EQ(derive({"-netdev", R"({"type":"dgram","id":"n","local":{"type":"fd","str":"5"}})"})[0],
            "error: -netdev n uses a descriptor that only the original VM had (local.str=5)");
  EXPECT_EQ(derive({"-nic", "tap,fd=7"}),
            (Words{"error: -nic tap,fd=7 uses a descriptor that only the original VM had (fd=7)",
                   "Change it with --replace OLD=NEW."}));
  EXPECT_EQ(derive({"-add-fd", "set=2,fd=9", "-drive", "file=/dev/fdset/2"})[0],
            "error: -add-fd set=2,fd=9 passes a descriptor that only the original VM had");
  EXPECT_EQ(derive({"-add-fd", "fd=9"})[0],
            "error: -add-fd fd=9 passes a descriptor that only the original VM had");
}

TEST(LaunchRules, AnExtraArgumentTakesThePlaceOfItsNamesake) {
  EXPECT_EQ(derive({"-netdev", "tap,fd=36,id=n", "-device", "e1000,netdev=n"},
                   {"-netdev", "user,id=n", "-m", "1G"}),
            (Words{"-netdev", "user,id=n", "-device", "e1000,netdev=n", "-m", "1G"}));
  EXPECT_EQ(derive({"-add-fd", "set=2,fd=9"}, {"-add-fd", "fd=5,set=2"}),
            (Words{"-add-fd", "fd=5,set=2"}));
  EXPECT_EQ(
      derive({"-blockdev", "file,node-name=f,filename=/a", "-blockdev", "raw,node-name=r,file=f"},
             {"-blockdev", R"({"driver":"file","node-name":"f","filename":"/b"})"}),
      (Words{"-blockdev", R"({"driver":"file","node-name":"f","filename":"/b"})", "-blockdev",
             "raw,node-name=r,file=f"}));
  EXPECT_EQ(derive({"-netdev", "user,id=n"}, {"-device", "e1000,id=n"}),
            (Words{"-netdev", "user,id=n", "-device", "e1000,id=n"}))
      << "another kind of option";
}

TEST(LaunchRules, ReplacementsComeFirst) {
  LaunchRequest replaced = request({"-drive", "file=/d/a.img,id=d", "-serial", "none", "/d/b.img"});
  replaced.replacements = {{"/d/", "/copy/d/"}};
  EXPECT_TRUE(contains(derive_launch_line(replaced)->arguments,
                       {"-drive", "file=/copy/d/a.img,id=d", "-serial", "none", "/copy/d/b.img"}));
  replaced.replacements = {{"/nowhere", "x"}};
  const auto line = derive_launch_line(replaced);
  ASSERT_FALSE(line);
  EXPECT_EQ(line.error().message(), "--replace /nowhere=x: no recorded argument contains it");
}

TEST(LaunchRules, ParsingReplacements) {
  const auto parsed = parse_replacement("a=b=c");
  ASSERT_TRUE(parsed);
  EXPECT_EQ(parsed->from, "a");
  EXPECT_EQ(parsed->to, "b=c");
  EXPECT_TRUE(parse_replacement("a="));
  EXPECT_EQ(parse_replacement("=b").error().message(), "--replace wants OLD=NEW, not \"=b\"");
  EXPECT_EQ(parse_replacement("ab").error().message(), "--replace wants OLD=NEW, not \"ab\"");
}

TEST(LaunchRules, ANewGeneration) {
  EXPECT_EQ(derive({"-device", "vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87,id=g"}),
            (Words{"-device", "vmgenid,guid=auto,id=g"}));
  EXPECT_EQ(derive({"-device", "vmgenid"}), (Words{"-device", "vmgenid,guid=auto"}));
}

TEST(LaunchRules, WhatIsNotKnownStays) {
  EXPECT_EQ(derive({"-append", "-S -incoming", "-unheard-of", "-monitor", "-usb", "-snapshot"}),
            (Words{"-append", "-S -incoming", "-unheard-of", "-monitor", "-usb", "-snapshot"}));
  EXPECT_EQ(derive({"-object", "{\"qom-type\":"}), (Words{"-object", "{\"qom-type\":"}));
  EXPECT_EQ(derive({"-m"}), Words{"-m"});
}

TEST(ShellQuoted, OneWord) {
  EXPECT_EQ(shell_quoted("a-b_c/d:e=f,g"), "a-b_c/d:e=f,g");
  EXPECT_EQ(shell_quoted(""), "''");
  EXPECT_EQ(shell_quoted("two words"), "'two words'");
  EXPECT_EQ(shell_quoted("it's"), "'it'\\''s'");
  EXPECT_EQ(shell_quoted("$HOME"), "'$HOME'");
}

}  // namespace
}  // namespace vmsnap
