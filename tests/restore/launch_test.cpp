// Starting a VMM, with a shell in its place.
#include "restore/launch.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/restore/test_image.h"

namespace vmsnap::testing {
namespace {

LaunchLine shell(const std::string& script) { return {"/bin/sh", {"sh", "-c", script}, "/"}; }

bool ends(const Process& process, int limit_ms = 30000) {
  pollfd exited = {process.pidfd(), POLLIN, 0};
  return ::poll(&exited, 1, limit_ms) > 0;
}

TEST(StartedVmTest, RunsInItsDirectoryWithItsLog) {
  const TemporaryDirectory directory;
  LaunchLine line = shell("pwd; echo to stderr >&2; cat; exec sleep 600");
  line.working_directory = directory.path();
  auto vm = StartedVm::start(line, directory / "log");
  ASSERT_TRUE(vm) << vm.error().message();
  std::string log;
  while (log.find("stderr") == std::string::npos) log = *read_small_file(directory / "log");
  EXPECT_EQ(log, directory.path() + "\nto stderr\n");
  EXPECT_EQ(::getsid(vm->process().pid()), vm->process().pid());
}

TEST(StartedVmTest, IsKilledWithItsObject) {
  const TemporaryDirectory directory;
  std::optional<Process> process;
  {
    auto vm = StartedVm::start(shell("exec sleep 600"), directory / "log");
    ASSERT_TRUE(vm);
    process.emplace(*Process::open(vm->process().pid()));
  }
  EXPECT_TRUE(ends(*process, 0));
}

TEST(StartedVmTest, LivesOnWhenItMay) {
  const TemporaryDirectory directory;
  std::optional<Process> process;
  {
    auto vm = StartedVm::start(shell("exec sleep 600"), directory / "log");
    ASSERT_TRUE(vm);
    process.emplace(*Process::open(vm->process().pid()));
    ASSERT_TRUE(vm->let_live());
  }
  EXPECT_FALSE(ends(*process, 100));
  kill_and_wait(*process);
  EXPECT_TRUE(ends(*process, 0));
}

// What the guard is for: nobody is there to run a destructor.
TEST(StartedVmTest, DiesWithAStarterThatIsKilled) {
  const TemporaryDirectory directory;
  for (const bool let_live : {false, true}) {
    const std::string pid_file = directory / "pid";
    const pid_t starter = ::fork();
    if (starter == 0) {
      auto vm = StartedVm::start(shell("exec sleep 600"), directory / "log");
      if (let_live) (void)vm->let_live();
      (void)write_small_file(pid_file, std::to_string(vm->process().pid()));
      ::kill(::getpid(), SIGKILL);
    }
    ::waitpid(starter, nullptr, 0);
    const auto process = Process::open(std::stoi(*read_small_file(pid_file)));
    if (let_live) {
      ASSERT_TRUE(process);
      EXPECT_FALSE(ends(*process, 200));
      kill_and_wait(*process);
    } else {
      EXPECT_TRUE(!process || ends(*process));
    }
  }
}

TEST(StartedVmTest, WhatCannotBeExecuted) {
  const TemporaryDirectory directory;
  const auto missing = StartedVm::start({"/no/such/qemu", {"qemu"}, "/"}, directory / "log");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code(), ErrorCode::vm);
  EXPECT_EQ(missing.error().message(),
            "cannot execute /no/such/qemu in directory /: No such file or directory");
  const auto nowhere = StartedVm::start({"/bin/sh", {"sh"}, "/no/such/place"}, directory / "log");
  ASSERT_FALSE(nowhere);
  EXPECT_EQ(nowhere.error().message(),
            "cannot execute /bin/sh in directory /no/such/place: No such file or directory");
}

TEST(StartedVmTest, ItsLastWordsExplainAnError) {
  const TemporaryDirectory directory;
  auto vm =
      StartedVm::start(shell("echo one; echo cannot open the disk >&2; exit 3"), directory / "log");
  ASSERT_TRUE(vm);
  ASSERT_TRUE(ends(vm->process()));
  const Error error = vm->explain(Error(ErrorCode::vm, "it went wrong").with_remedy("Do this."));
  EXPECT_EQ(error.message(),
            "it went wrong (it exited with status 3; it said: one|cannot open the disk)");
  EXPECT_EQ(error.remedy(), "Do this.");
}

}  // namespace
}  // namespace vmsnap::testing
