// The command line of a VM that libvirt ran, where libvirt is not.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "restore/launch_rules.h"

namespace vmsnap {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using Arguments = std::vector<std::string>;

LaunchRequest request_of(Arguments recorded, Arguments extra = {}) {
  LaunchRequest request;
  request.record.executable = "/usr/bin/qemu-system-x86_64";
  request.record.working_directory = "/";
  request.record.arguments = std::move(recorded);
  request.record.arguments.insert(request.record.arguments.begin(),
                                  {"qemu", "-nodefaults", "-nographic"});
  request.run_dir = "/run/d";
  request.extra = std::move(extra);
  return request;
}

// Without argv[0] and the two words behind it, and without what is always added.
Arguments derived(const LaunchRequest& request) {
  const auto line = derive_launch_line(request);
  if (!line) return {"error: " + line.error().message()};
  Arguments words(line->arguments.begin() + 3, line->arguments.end());
  const auto ours = std::find(words.begin(), words.end(), "-monitor");
  const Arguments extra(words.end() - static_cast<ptrdiff_t>(request.extra.size()), words.end());
  words.erase(ours, words.end());
  if (extra == request.extra) words.insert(words.end(), extra.begin(), extra.end());
  return words;
}

Arguments derive_there(Arguments recorded, Arguments extra = {}) {
  return derived(request_of(std::move(recorded), std::move(extra)));
}

TEST(LaunchOfLibvirt, ItsMonitorAndConsoleAreOurs) {
  // As libvirt 9.0 starts QEMU 7.2.
  EXPECT_EQ(derive_there({"-name", "guest=vm,debug-threads=on", "-S", "-object",
                    R"({"qom-type":"secret","id":"masterKey0","format":"raw","file":"/l/master-key.aes"})",
                    "-machine", "pc-i440fx-7.2,usb=off,memory-backend=pc.ram", "-object",
                    R"({"qom-type":"memory-backend-ram","id":"pc.ram","size":268435456})",
                    "-overcommit", "mem-lock=off", "-no-user-config", "-chardev",
                    "socket,id=charmonitor,fd=24,server=on,wait=off", "-mon",
                    "chardev=charmonitor,id=monitor,mode=control", "-add-fd",
                    "set=0,fd=21,opaque=serial0-source", "-chardev",
                    "file,id=charserial0,path=/dev/fdset/0,append=on", "-device",
                    R"({"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0})",
                    "-sandbox", "on,obsolete=deny"}),
            (Arguments{"-name", "guest=vm,debug-threads=on", "-machine",
                   "pc-i440fx-7.2,usb=off,memory-backend=pc.ram", "-object",
                   R"({"qom-type":"memory-backend-ram","id":"pc.ram","size":268435456})",
                   "-no-user-config", "-chardev",
                   "socket,id=charmonitor,path=/run/d/charmonitor.sock,server=on,wait=off", "-mon",
                   "chardev=charmonitor,id=monitor,mode=control", "-chardev",
                   "file,id=charserial0,path=/run/d/charserial0.log", "-device",
                   R"({"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0})",
                   "-sandbox", "on,obsolete=deny"}));
}

TEST(LaunchOfLibvirt, DescriptorsThatNothingNamesAnyMoreAreDropped) {
  EXPECT_EQ(derive_there({"-add-fd", "set=2,fd=9", "-chardev", "file,id=c,path=/dev/fdset/2,append=on",
                    "-drive", "file=/dev/fdset/21"}),
            (Arguments{"-chardev", "file,id=c,path=/run/d/c.log", "-drive", "file=/dev/fdset/21"}));
  EXPECT_EQ(derive_there({"-add-fd", "set=2,fd=9", "-drive", "file=/a,id=d"},
                   {"-drive", "file=/dev/fdset/2,id=d"})[0],
            "error: -add-fd set=2,fd=9 passes a descriptor that only the original VM had");
}

TEST(LaunchOfLibvirt, SecretsThatNothingNamesAreDropped) {
  const char* key = R"({"qom-type":"secret","id":"masterKey0","format":"raw","file":"/d/master-key.aes"})";
  EXPECT_EQ(derive_there({"-object", key, "-m", "1G"}), (Arguments{"-m", "1G"}));
  const Arguments named = {"-object", key, "-object", "secret,id=s,keyid=masterKey0,data=x",
                       "-blockdev", R"({"driver":"luks","node-name":"l","key-secret":"s"})"};
  EXPECT_EQ(derive_there(named), named);
  EXPECT_EQ(derive_there({"-object", "secret,id=s,file=/s"}, {"-object", "tls-creds-x509,id=t,passwordid=s"}),
            (Arguments{"-object", "secret,id=s,file=/s", "-object", "tls-creds-x509,id=t,passwordid=s"}));
  EXPECT_EQ(derive_there({"-object", key, "-object", "secret,id=s,keyid=masterKey0,data=x", "-m", "1G"}),
            (Arguments{"-m", "1G"}));
  // Given by the user: it may be for later.
  EXPECT_EQ(derive_there({"-object", "secret,id=s,file=/s"}, {"-object", "secret,id=s,file=/t"}),
            (Arguments{"-object", "secret,id=s,file=/t"}));
}

TEST(LaunchOfLibvirt, AFileInTheDisksPlaceMayBeAnOverlay) {
  const Arguments recorded = {
      "-blockdev", R"({"driver":"file","filename":"/d/vm.qcow2","node-name":"s"})", "-blockdev",
      R"({"node-name":"f","driver":"qcow2","file":"s","backing":null})", "-blockdev",
      "qcow2,node-name=g,file=s,backing="};
  EXPECT_EQ(derive_there(recorded), recorded);
  LaunchRequest replaced = request_of(recorded);
  replaced.replacements = {{"/d/vm.qcow2", "/o/overlay"}};
  EXPECT_EQ(derived(replaced),
            (Arguments{"-blockdev", R"({"driver":"file","filename":"/o/overlay","node-name":"s"})",
                   "-blockdev", R"({"node-name":"f","driver":"qcow2","file":"s"})", "-blockdev",
                   "qcow2,node-name=g,file=s"}));
  replaced.record.arguments.insert(replaced.record.arguments.end(),
                                   {"-blockdev", R"({"driver":"qcow2","node-name":"h","file":"s","backing":"f"})"});
  EXPECT_THAT(derived(replaced), Contains(HasSubstr(R"("backing":"f")")));
}

}  // namespace
}  // namespace vmsnap
