// The guard resumes a VM whose snapshotter died, and ends one that stands still.
#include "snap/guard.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "formats/image_info.h"
#include "snap/pause_command.h"
#include "tests/snap/victim.h"

namespace vmsnap {
namespace {

using namespace std::chrono_literals;

// A monitor that answers everything and notes which commands it got.
class FakeMonitor {
 public:
  // The first `drops` clients that send "cont" are hung up on instead.
  // After them, the first `refusals` are answered by an error.
  explicit FakeMonitor(int drops = 0, int refusals = 0)
      : drops_(drops), refusals_(refusals), path_(fmt::format("/tmp/vmsnap-guard-test-{}.sock", ::getpid())) {
    ::unlink(path_.c_str());
    listener_ = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.c_str(), path_.size());
    EXPECT_EQ(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    EXPECT_EQ(::listen(listener_.get(), 4), 0);
    thread_ = std::thread([this] { serve(); });
  }
  ~FakeMonitor() {
    ::shutdown(listener_.get(), SHUT_RDWR);
    thread_.join();
    ::unlink(path_.c_str());
  }

  const std::string& path() const { return path_; }
  bool resumed() const { return resumed_; }

 private:
  void serve() {
    for (;;) {
      Fd client(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!client) return;
      send(client, "{\"QMP\": {}}\r\n");
      std::string text;
      char buffer[4096];
      for (ssize_t got; client && (got = ::recv(client.get(), buffer, sizeof buffer, 0)) > 0;) {
        text.append(buffer, static_cast<size_t>(got));
        for (size_t end; (end = text.find('\n')) != std::string::npos; text.erase(0, end + 1)) {
          const auto command = nlohmann::json::parse(text.substr(0, end), nullptr, false);
          if (!command.is_object()) continue;
          if (command.value("execute", "") == "cont" && drops_-- > 0) {
            client.reset();
            break;
          }
          nlohmann::json answer = {{"return", nlohmann::json::object()}};
          const bool refused = command.value("execute", "") == "cont" && refusals_-- > 0;
          if (refused) answer = {{"error", {{"class", "GenericError"}, {"desc", "not now"}}}};
          if (command.contains("id")) answer["id"] = command["id"];
          send(client, answer.dump() + "\r\n");
          if (!refused && command.value("execute", "") == "cont") {
            resumed_ = true;
            send(client, "{\"event\": \"RESUME\"}\r\n");
          }
        }
      }
    }
  }
  static void send(const Fd& client, const std::string& text) {
    (void)!::send(client.get(), text.data(), text.size(), MSG_NOSIGNAL);
  }

  int drops_, refusals_;
  std::string path_;
  Fd listener_;
  std::thread thread_;
  std::atomic<bool> resumed_ = false;
};

// A snapshotter that says to its guard what `act` makes it say, then waits to
// be killed.
template <class Act>
int run_snapshotter(const std::string& path, std::chrono::milliseconds limit, Act act) {
  Victim snapshotter([&] {
    auto qmp = Qmp::connect(path);
    if (!qmp) return 1;
    const Process vm = *Process::open(*qmp->peer_pid());
    auto guard = Guard::start({vm, &*qmp}, nullptr, limit);
    if (!guard) return 2;
    act(*guard);
    return 0;
  });
  return snapshotter.wait();
}

constexpr int killed = 1000 + SIGKILL;

void die_in_the_pause(Guard& guard) {
  guard.pausing();
  ::kill(::getpid(), SIGKILL);
}

TEST(Guard, ResumesTheVmWhenWeDieInThePause) {
  FakeMonitor monitor;
  EXPECT_EQ(run_snapshotter(monitor.path(), 60s, die_in_the_pause), killed);
  EXPECT_TRUE(becomes_true([&] { return monitor.resumed(); }));
}

TEST(Guard, ResumesTheVmThoughItsMonitorHangsUp) {
  FakeMonitor monitor(/*drops=*/3);
  EXPECT_EQ(run_snapshotter(monitor.path(), 60s, die_in_the_pause), killed);
  EXPECT_TRUE(becomes_true([&] { return monitor.resumed(); }));
}

TEST(Guard, LeavesTheVmAloneWhenThereIsNothingToResume) {
  FakeMonitor monitor;
  EXPECT_EQ(run_snapshotter(monitor.path(), 60s,
                            [](Guard& guard) {
                              guard.pausing();
                              guard.resumed();
                              ::kill(::getpid(), SIGKILL);
                            }),
            killed);
  // The next client is served: the guard has let the monitor go.
  auto next = Qmp::connect(monitor.path());
  EXPECT_TRUE(next);
  EXPECT_FALSE(monitor.resumed());
}

TEST(Guard, EndsASnapshotterThatStandsStillInThePause) {
  FakeMonitor monitor;
  EXPECT_EQ(run_snapshotter(monitor.path(), 100ms,
                            [](Guard& guard) {
                              guard.pausing();
                              ::kill(::getpid(), SIGSTOP);
                            }),
            killed);
  EXPECT_TRUE(becomes_true([&] { return monitor.resumed(); }));
}

TEST(Guard, EndsASnapshotterWithoutHeartbeatsWhileMemoryIsProtected) {
  FakeMonitor monitor;
  EXPECT_EQ(run_snapshotter(monitor.path(), 100ms,
                            [](Guard& guard) {
                              guard.watching();
                              ::pause();
                            }),
            killed);
  EXPECT_FALSE(monitor.resumed());
}

TEST(Guard, HeartbeatsKeepItQuiet) {
  FakeMonitor monitor;
  EXPECT_EQ(run_snapshotter(monitor.path(), 2000ms,
                            [](Guard& guard) {
                              guard.watching();
                              for (int i = 0; i < 300; ++i) {
                                guard.heartbeat();
                                std::this_thread::sleep_for(10ms);
                              }
                              guard.unwatched();
                            }),
            0);
}

// Its end does not: here this process has the userfaultfd open, too, like a thread that
// cannot die because it waits for a disk.
TEST(Guard, FreesTheMemoryOfASnapshotterThatCannotGo) {
  void* memory = ::mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  const RemoteRange range = {RemotePtr(reinterpret_cast<uint64_t>(memory)), page_size};
  Fd raw(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
  const Uffd uffd = *Uffd::initialize(std::move(raw), 0);
  ASSERT_TRUE(uffd.register_range(range, {.missing = true, .write_protect = false}));
  const Process self = *Process::open(::getpid());
  Victim snapshotter([&] {
    auto guard = Guard::start({self, nullptr, {range}}, nullptr, 100ms);
    if (!guard) return 2;
    guard->watching();
    guard->watched(uffd);
    ::pause();
    return 0;
  });
  std::atomic<bool> touched = false;
  std::thread toucher([&] {
    *static_cast<volatile char*>(memory) = 1;
    touched = true;
  });
  EXPECT_TRUE(becomes_true([&] { return touched.load(); }));
  EXPECT_EQ(snapshotter.wait(), killed);
  if (!touched) (void)uffd.unregister_range(range);
  toucher.join();
  ::munmap(memory, page_size);
}

TEST(Guard, DoesNotResumeAnotherVmThatTookThePath) {
  FakeMonitor monitor;
  Victim gone([] { return 0; });
  const Process vm = gone.process();
  EXPECT_EQ(gone.wait(), 0);
  Victim snapshotter([&] {
    auto qmp = Qmp::connect(monitor.path());
    if (!qmp) return 1;
    auto guard = Guard::start({vm, &*qmp}, nullptr, 60s);
    if (!guard) return 2;
    guard->pausing();
    // Its own connection ends with the VM.
    ::shutdown(qmp->fd(), SHUT_RDWR);
    ::kill(::getpid(), SIGKILL);
    return 0;
  });
  EXPECT_EQ(snapshotter.wait(), killed);
  // The next client is served: the guard does not stay.
  EXPECT_TRUE(Qmp::connect(monitor.path()));
  EXPECT_FALSE(monitor.resumed());
}

TEST(Guard, TriesAgainWhenQemuRefuses) {
  FakeMonitor monitor(/*drops=*/0, /*refusals=*/2);
  EXPECT_EQ(run_snapshotter(monitor.path(), 60s, die_in_the_pause), killed);
  EXPECT_TRUE(becomes_true([&] { return monitor.resumed(); }));
}

TEST(Guard, LeavesACommitItsTime) {
  FakeMonitor monitor;
  EXPECT_EQ(run_snapshotter(monitor.path(), 100ms,
                            [](Guard& guard) {
                              guard.pausing();
                              guard.committing();
                              std::this_thread::sleep_for(1500ms);
                              guard.resumed();
                            }),
            0);
}

TEST(PauseCommand, SaysHowItFailed) {
  EXPECT_TRUE(run_pause_command("test \"$VMSNAP_ID\" = abc", {"VMSNAP_ID=abc"}, 60s));
  const auto code = run_pause_command("exit 7", {}, 60s);
  ASSERT_FALSE(code);
  EXPECT_EQ(code.error().code(), ErrorCode::pause_command);
  EXPECT_EQ(code.error().message(), "the --in-pause command 'exit 7' exited with status 7");
  const auto slow = run_pause_command("sleep 1000 & wait", {}, 50ms);
  ASSERT_FALSE(slow);
  EXPECT_EQ(slow.error().message(),
            "the --in-pause command 'sleep 1000 & wait' did not end within 50 ms");
  EXPECT_EQ(run_pause_command("kill -9 $$", {}, 60s).error().message(),
            "the --in-pause command 'kill -9 $$' was ended by signal 9");
}

}  // namespace
}  // namespace vmsnap
