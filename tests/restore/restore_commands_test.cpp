// The commands as main runs them, in-process, as far as no VM is needed.
#include "restore/restore_commands.h"

#include <CLI/CLI.hpp>
#include <sstream>
#include <thread>

#include "restore/run_dir.h"
#include "snap/vmm/vm_record.h"
#include "tests/restore/test_image.h"

namespace vmsnap::testing {
namespace {

class Commands : public ::testing::Test {
 protected:
  // Parses and runs; what main would print ends up in out_.
  Status run(std::vector<std::string> words) {
    CommandContext context{.out = out_, .err = err_, .terminal = false, .run = {}};
    CLI::App app("test", "vmsnap");
    add_restore_commands(app, context);
    std::reverse(words.begin(), words.end());
    try {
      app.parse(words);
    } catch (const CLI::ParseError& error) {
      app.exit(error, out_, err_);
      return fail(ErrorCode::usage, "{}", error.what());
    }
    return context.run();
  }
  std::string error_of(std::vector<std::string> words) {
    const Status ran = run(std::move(words));
    return ran ? "no error" : ran.error().message();
  }

  std::string vm_image() {
    VmRecord record;
    record.name = "test";
    record.executable = "/no/such/qemu";
    record.arguments = {"qemu", "-m", "64", "-nographic", "-netdev", "user,id=n"};
    record.working_directory = "/";
    record.machine = "pc-i440fx-7.2";
    const std::string path = directory_ / "vm.img";
    write_image(path, 8, to_json(record), {{"pc.ram", 0, 8 * page_size, 0}});
    return path;
  }

  TemporaryDirectory directory_;
  std::ostringstream out_, err_;
};

TEST_F(Commands, HelpHasExamples) {
  EXPECT_EQ(error_of({"restore", "--help"}),
            "This should be caught in your main function, see examples");
  EXPECT_NE(out_.str().find("vmsnap restore vm.img -- -netdev user,id=net0"), std::string::npos);
  out_.str("");
  run({"serve", "--help"});
  EXPECT_NE(out_.str().find("vmsnap serve vm.img --socket /run/uffd.sock --once"),
            std::string::npos);
}

TEST_F(Commands, DryRunPrintsTheCommandLine) {
  const std::string image = vm_image();
  EXPECT_EQ(error_of({"restore", image, "--dry-run", "--run-dir", "/run/d", "--replace", "64=128",
                      "--", "-netdev", "tap,id=n", "-name", "two words"}),
            "no error");
  EXPECT_EQ(out_.str(),
            "/no/such/qemu -m 128 -nographic -netdev tap,id=n -machine type=pc-i440fx-7.2 "
            "-serial file:/run/d/serial0.log -monitor none -qmp "
            "unix:/run/d/qmp.sock,server=on,wait=off -pidfile /run/d/qemu.pid -global "
            "migration.send-configuration=off -S -incoming defer -name 'two words'\n");
  out_.str("");
  ASSERT_TRUE(run({"restore", image, "--dry-run", "--json", "--qemu", "/q"}));
  const auto array = nlohmann::json::parse(out_.str());
  EXPECT_EQ(array[0], "/q");
  EXPECT_EQ(array[1], "-m");
}

TEST_F(Commands, UsageErrors) {
  const std::string image = vm_image();
  EXPECT_EQ(error_of({"restore"}), "restore wants an image");
  EXPECT_EQ(error_of({"restore", image, "--reattach", directory_.path()}),
            "--reattach takes the image and the VM from its directory");
  EXPECT_EQ(error_of({"restore", image, "--replace", "x"}), "--replace wants OLD=NEW, not \"x\"");
  EXPECT_EQ(error_of({"serve", image}), "--socket is required");
  EXPECT_EQ(run({"restore", image, "--reattach", directory_.path()}).error().code(),
            ErrorCode::usage);
  for (const std::vector<std::string>& of_a_start :
       {std::vector<std::string>{"--dry-run"}, {"--start-paused"}, {"--fix-clock"},
        {"--record-working-set"}, {"--run-dir", "d"}, {"--clones", "2"}, {"--memory", "8M"},
        {"--replace", "a=b"}, {"--qemu", "q"}, {"--chdir", "/"}, {"--store", "s"}}) {
    std::vector<std::string> words = {"restore", "--reattach", directory_.path()};
    words.insert(words.end(), of_a_start.begin(), of_a_start.end());
    const std::string error = error_of(words);
    EXPECT_NE(error.find(of_a_start[0]), std::string::npos) << error;
    EXPECT_NE(error.find("excludes"), std::string::npos) << error;
  }
}

TEST_F(Commands, AnImageOfAProcessIsNotRestored) {
  const std::string path = directory_ / "process.img";
  write_image(path, 4);
  const Status ran = run({"restore", path});
  ASSERT_FALSE(ran);
  EXPECT_EQ(ran.error().code(), ErrorCode::refused);
  EXPECT_TRUE(ran.error().message().starts_with(path + ": ")) << ran.error().message();
}

TEST_F(Commands, AFailedRestoreLeavesNothingBehind) {
  const std::string image = vm_image();
  const std::string run_dir = directory_ / "run";
  EXPECT_EQ(error_of({"restore", image, "--run-dir", run_dir}),
            "cannot execute /no/such/qemu in directory /: No such file or directory");
  EXPECT_FALSE(std::filesystem::exists(run_dir));
  EXPECT_TRUE(error_of({"restore", directory_ / "no.img"}).starts_with("cannot open "));
}

class Reattach : public Commands {
 protected:
  void leave(RestorePhase phase, pid_t pid = 0) {
    RestoreRecord record;
    record.phase = phase;
    record.image = "/images/a.img";
    record.pid = pid;
    record.start_time = 1;
    record.uffd = 5;
    ASSERT_TRUE(RunDir::create(directory_.path())->write(record));
  }
};

TEST_F(Reattach, AHalfStartedVmIsToBeStartedAgain) {
  leave(RestorePhase::loading);
  const Status ran = run({"restore", "--reattach", directory_.path()});
  ASSERT_FALSE(ran);
  EXPECT_EQ(ran.error().code(), ErrorCode::vm);
  EXPECT_EQ(ran.error().message(), "the restore in " + directory_.path() +
                                       " was cut short before its guest ran; its QEMU is ended");
  EXPECT_EQ(ran.error().remedy(),
            "Start again: vmsnap restore /images/a.img --run-dir " + directory_.path());
}

TEST_F(Reattach, AVmThatIsGone) {
  leave(RestorePhase::running, ::getpid());  // our number, another start time
  EXPECT_EQ(error_of({"restore", "--reattach", directory_.path()}),
            fmt::format("the VM (process {}) has ended; its memory went with it", ::getpid()));
}

TEST_F(Reattach, AVmThatHasAllOfItsMemory) {
  RestoreRecord record;
  record.phase = RestorePhase::complete;
  record.image_id = "0123";
  record.qmp = "/q\xff";
  record.pid = ::getpid();
  record.start_time = Process::open(::getpid())->start_time();
  const std::string path = std::filesystem::canonical(directory_.path()).string();
  ASSERT_TRUE(RunDir::create(path)->write(record));
  std::filesystem::remove(path + "/lock");  // as its page server did
  ASSERT_TRUE(run({"restore", "--reattach", path}));
  EXPECT_TRUE(out_.str().ends_with(" has all of its memory already\n")) << out_.str();
  out_.str("");
  ASSERT_TRUE(run({"restore", "--reattach", path, "--json"}));
  const auto json = nlohmann::json::parse(out_.str());
  EXPECT_EQ(json, nlohmann::json({{"id", "0123"},
                                  {"run_dir", path},
                                  {"pid", ::getpid()},
                                  {"server_pid", 0},
                                  {"qmp", "/q\xEF\xBF\xBD"},
                                  {"phase", "complete"}}));
  EXPECT_FALSE(std::filesystem::exists(path + "/lock"));
}

TEST_F(Reattach, NoLockIsMadeWhereNothingIsServed) {
  const std::string lock = directory_ / "lock";
  EXPECT_FALSE(run({"restore", "--reattach", directory_.path()}));
  EXPECT_FALSE(std::filesystem::exists(lock)) << "it is no run directory";
  leave(RestorePhase::ended, ::getpid());  // our number, another start time
  std::filesystem::remove(lock);
  EXPECT_FALSE(run({"restore", "--reattach", directory_.path()}));
  EXPECT_FALSE(std::filesystem::exists(lock)) << "that VM has ended";
}

TEST_F(Reattach, WhereThereIsNothing) {
  EXPECT_EQ(error_of({"restore", "--reattach", directory_ / "none"}),
            "cannot open the run directory " + directory_ / "none" + ": No such file or directory");
  EXPECT_EQ(error_of({"restore", "--reattach", directory_.path()}),
            "cannot open " + std::filesystem::canonical(directory_.path()).string() +
                "/restore.json: No such file or directory");
}

TEST_F(Commands, ServeDoesNotTakeASocketAway) {
  const std::string path = directory_ / "process.img";
  write_image(path, 4);
  ASSERT_TRUE(write_small_file(directory_ / "file", "x"));
  EXPECT_EQ(error_of({"serve", path, "--socket", directory_ / "file"}),
            directory_ / "file" + " exists and is no socket");
  EXPECT_EQ(error_of({"serve", path, "--socket", "/" + std::string(200, 'x')}),
            "the socket path /" + std::string(200, 'x') + " is too long (at most 107 bytes)");
}

}  // namespace
}  // namespace vmsnap::testing
