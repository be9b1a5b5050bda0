// Borrowing threads of a process, and stopping all of them, without its
// noticing.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/time.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <thread>

#include "snap/vmm/handover.h"
#include "snap/vmm/injector.h"
#include "snap/vmm/thread_stop.h"
#include "tests/snap/victim.h"

namespace vmsnap {
namespace {

using namespace std::chrono_literals;

void wait_until(const std::function<bool()>& condition) { ASSERT_TRUE(becomes_true(condition)); }

struct Signals {
  std::atomic<int> ready{0};
  std::atomic<int> go_on{0};
  std::atomic<uint64_t> rounds{0};
  std::atomic<int> wrong{0};
};

TEST(Injected, RunsASystemCallInTheTarget) {
  Victim victim([] {
    ::pause();
    return 0;
  });
  std::this_thread::sleep_for(20ms);
  const Process process = victim.process();
  const auto pid = run_injected(
      process, [](RemoteThread& thread, InjectorLink&) { return thread.call(SYS_getpid, {}); });
  ASSERT_TRUE(pid) << pid.error().message();
  EXPECT_EQ(*pid, victim.pid());
}

TEST(ProcessEnd, ASignalIsNotIt) {
  Victim victim([] {
    ::pause();
    return 0;
  });
  struct sigaction before = {}, noted = {};
  noted.sa_handler = [](int) {};
  ASSERT_EQ(::sigaction(SIGALRM, &noted, &before), 0);
  const itimerval often = {.it_interval = {0, 10000}, .it_value = {0, 10000}};
  ::setitimer(ITIMER_REAL, &often, nullptr);
  EXPECT_FALSE(victim.process().wait_for_end(100ms));
  const itimerval never = {};
  ::setitimer(ITIMER_REAL, &never, nullptr);
  ::sigaction(SIGALRM, &before, nullptr);
}

TEST(ProcessThread, SaysWhereItRanLast) {
  const Victim victim([]() -> int {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(::sched_getcpu(), &one);
    ::sched_setaffinity(0, sizeof one, &one);
    for (;;) ::pause();
  });
  cpu_set_t allowed;
  ASSERT_TRUE(becomes_true([&] {
    return ::sched_getaffinity(victim.process().pid(), sizeof allowed, &allowed) == 0 && CPU_COUNT(&allowed) == 1;
  }));
  const auto processor = victim.process().last_processor(victim.process().pid());
  ASSERT_TRUE(processor) << processor.error().message();
  EXPECT_TRUE(CPU_ISSET(*processor, &allowed));
  EXPECT_FALSE(victim.process().last_processor(::getpid()));
}

TEST(Injected, AStopThatCameMeanwhileIsNotLost) {
  Victim victim([] {
    for (;;) ::pause();
    return 0;
  });
  std::this_thread::sleep_for(20ms);
  const Process process = victim.process();
  const auto errand = [&](RemoteThread& thread, InjectorLink&) -> Result<int64_t> {
    ::kill(victim.pid(), SIGSTOP);
    return thread.call(SYS_getpid, {});
  };
  EXPECT_EQ(run_injected(process, errand).value_or(-1), victim.pid());
  wait_until([&] { return process.status_field("State").value_or("").starts_with("T"); });
  ::kill(victim.pid(), SIGCONT);
  wait_until([&] { return process.status_field("State").value_or("").starts_with("S"); });
  EXPECT_TRUE(process.alive());
}

// We, stopped by somebody, must not hold a thread of the VM.
TEST(Injected, WhoDoesNotAnswerIsNotWaitedFor) {
  Victim victim([] {
    ::pause();
    return 0;
  });
  std::this_thread::sleep_for(20ms);
  const Process process = victim.process();
  const auto errand = [](RemoteThread&, InjectorLink& link) -> Result<int64_t> {
    return link.ask(1, /*otherwise=*/7);
  };
  const auto answer = [&](int64_t) -> int64_t {
    EXPECT_TRUE(becomes_true([&] { return *process.status_field("TracerPid") == "0"; }));
    return 8;
  };
  EXPECT_EQ(run_injected(process, errand, answer).value_or(-1), 7);
}

// A blocking read must not return early, and a computation must not change,
// however often a thread is borrowed.
TEST(Injected, LeavesWaitingAndComputingThreadsAsTheyWere) {
  Signals* signals = shared_with_victim<Signals>();
  int pipe_ends[2];
  ASSERT_EQ(::pipe(pipe_ends), 0);
  Victim victim([&] {
    std::thread busy([signals] {
      // Any lost register shows up in the sum.
      while (!signals->go_on) {
        uint64_t a = 1, b = 2, c = 3, d = 4;
        double x = 1.5;
        for (uint64_t i = 0; i < 100000; ++i) {
          a += i ^ b;
          b = b * 6364136223846793005u + a;
          c ^= b >> 7;
          d += c;
          x = x * 1.0000001 + 0.5;
        }
        static const uint64_t expected = d;
        static const double expected_x = x;
        if (d != expected || x != expected_x) signals->wrong = 1;
        ++signals->rounds;
      }
    });
    signals->ready = 1;
    char byte = 0;
    const ssize_t got = ::read(pipe_ends[0], &byte, 1);
    if (got != 1 || byte != 'x') signals->wrong = 2;
    signals->go_on = 1;
    busy.join();
    return signals->wrong.load();
  });
  wait_until([&] { return signals->ready && signals->rounds > 2; });
  const Process process = victim.process();
  for (int i = 0; i < 200; ++i) {
    const auto number = run_injected(
        process, [](RemoteThread& thread, InjectorLink&) { return thread.call(SYS_gettid, {}); });
    ASSERT_TRUE(number) << number.error().message();
    EXPECT_GT(*number, 0);
  }
  EXPECT_EQ(::write(pipe_ends[1], "x", 1), 1);
  EXPECT_EQ(victim.wait(), 0);
}

TEST(Injected, AProcessThatNeverWaitsCanBeBorrowedToo) {
  Signals* signals = shared_with_victim<Signals>();
  Victim victim([&] {
    while (!signals->go_on) ++signals->rounds;
    return 0;
  });
  wait_until([&] { return signals->rounds > 1000; });
  const auto pid = run_injected(victim.process(), [](RemoteThread& thread, InjectorLink&) {
    return thread.call(SYS_getpid, {});
  });
  ASSERT_TRUE(pid) << pid.error().message();
  const uint64_t before = signals->rounds;
  wait_until([&] { return signals->rounds > before; });
  signals->go_on = 1;
  EXPECT_EQ(victim.wait(), 0);
}

TEST(Injected, SaysWhoTracesAlready) {
  Victim victim([] {
    ::pause();
    return 0;
  });
  const Process process = victim.process();
  const ThreadStop stopped = *ThreadStop::stop(process);
  const auto refused = run_injected(
      process, [](RemoteThread& thread, InjectorLink&) { return thread.call(SYS_getpid, {}); });
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::refused);
  EXPECT_NE(refused.error().message().find("is being traced by process"), std::string::npos);
}

TEST(Handover, BringsOutAUserfaultfdAndLeavesNoDescriptor) {
  Victim victim([] {
    ::pause();
    return 0;
  });
  const Process process = victim.process();
  const auto before = process.descriptors();
  auto handed = bring_out_uffd(process, nullptr, uffd_feature::pagefault_flag_wp, KeepInVmm::no);
  ASSERT_TRUE(handed) << handed.error().message();
  EXPECT_EQ(handed->remote_fd, -1);
  EXPECT_EQ(process.descriptors()->size(), before->size());
}

TEST(Handover, KeepsItInTheTargetWhereAsked) {
  Victim victim([] {
    ::pause();
    return 0;
  });
  const Process process = victim.process();
  auto handed = bring_out_uffd(process, nullptr, uffd_feature::missing_shmem, KeepInVmm::yes);
  ASSERT_TRUE(handed) << handed.error().message();
  const auto kept = process.descriptors();
  const auto is_kept = [&](const auto& entry) {
    return entry.first == handed->remote_fd && entry.second == "anon_inode:[userfaultfd]";
  };
  EXPECT_TRUE(std::any_of(kept->begin(), kept->end(), is_kept));
  ASSERT_TRUE(close_in_process(process, handed->remote_fd));
  EXPECT_EQ(process.descriptors()->size(), kept->size() - 1);
}

// An unprivileged process without a monitor gets the device over a socket.
TEST(Handover, WorksOnAnUnprivilegedProcess) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to drop privileges";
  Signals* signals = shared_with_victim<Signals>();
  Victim victim([&] {
    if (::setgid(65534) || ::setuid(65534)) return 1;
    signals->ready = 1;
    ::pause();
    return 0;
  });
  wait_until([&] { return signals->ready == 1; });
  const Process process = victim.process();
  const size_t before = process.descriptors()->size();
  auto handed = bring_out_uffd(process, nullptr, uffd_feature::pagefault_flag_wp, KeepInVmm::no);
  ASSERT_TRUE(handed) << handed.error().message();
  EXPECT_EQ(process.descriptors()->size(), before);
}

// A seccomp filter that kills for one system call.
bool forbid(uint32_t number) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter = {std::size(program), program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

// Its filter is suspended for our call; where the kernel does not allow that, to who
// has a filter itself, the call is not made.
TEST(Handover, DoesNotGetATargetKilledByItsFilter) {
  Signals* signals = shared_with_victim<Signals>();
  Victim victim([&] {
    if (!forbid(SYS_userfaultfd)) return 1;
    signals->ready = 1;
    while (signals->go_on == 0) std::this_thread::sleep_for(1ms);
    return 0;
  });
  wait_until([&] { return signals->ready == 1; });
  const auto attach = [&] { return bring_out_uffd(victim.process(), nullptr, 0, KeepInVmm::no); };
  Victim filtered([&] {
    if (!forbid(SYS_reboot)) return 1;
    const auto handed = attach();
    return handed ? 2 : handed.error().code() == ErrorCode::privilege ? 0 : 3;
  });
  EXPECT_EQ(filtered.wait(), 0);
  const auto handed = attach();
  EXPECT_TRUE(handed) << handed.error().message();
  signals->go_on = 1;
  EXPECT_EQ(victim.wait(), 0);
}

TEST(ThreadStop, StopsEveryThreadAndLetsThemGoOn) {
  Signals* signals = shared_with_victim<Signals>();
  Victim victim([&] {
    std::vector<std::thread> threads;
    for (int i = 0; i < 6; ++i) {
      threads.emplace_back([&] {
        while (!signals->go_on) ++signals->rounds;
      });
    }
    for (std::thread& thread : threads) thread.join();
    return 0;
  });
  wait_until([&] { return signals->rounds > 1000; });
  const Process process = victim.process();
  {
    auto stopped = ThreadStop::stop(process);
    ASSERT_TRUE(stopped) << stopped.error().message();
    const uint64_t then = signals->rounds;
    std::this_thread::sleep_for(20ms);
    EXPECT_EQ(signals->rounds, then);
  }
  const uint64_t before = signals->rounds;
  wait_until([&] { return signals->rounds > before + 1000; });
  signals->go_on = 1;
  EXPECT_EQ(victim.wait(), 0);
}

// epoll_wait is never restarted by the kernel after a stop; a process that we
// stopped, or of which we borrowed a thread, must not see EINTR all the same.
class WaitingForEvents : public ::testing::Test {
 protected:
  void SetUp() override {
    wait_until([&] { return signals_->ready == 1; });
    std::this_thread::sleep_for(20ms);
  }

  static int live(Signals* signals, int pipe_end) {
    const int poll = ::epoll_create1(0);
    epoll_event event = {};
    event.events = EPOLLIN;
    ::epoll_ctl(poll, EPOLL_CTL_ADD, pipe_end, &event);
    signals->ready = 1;
    const int ready = ::epoll_wait(poll, &event, 1, -1);
    return ready == 1 ? 0 : errno;
  }

  void expect_it_waited() {
    EXPECT_EQ(::write(pipe_.ends[1], "x", 1), 1);
    EXPECT_EQ(victim_.wait(), 0);
  }

  struct Pipe {
    Pipe() { EXPECT_EQ(::pipe(ends), 0); }
    int ends[2];
  };
  Signals* const signals_ = shared_with_victim<Signals>();
  const Pipe pipe_;
  Victim victim_{[this] { return live(signals_, pipe_.ends[0]); }};
  const Process process_ = victim_.process();
};

TEST_F(WaitingForEvents, DoesNotSeeAStop) {
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(ThreadStop::stop(process_));
    std::this_thread::sleep_for(2ms);
  }
  expect_it_waited();
}

TEST_F(WaitingForEvents, DoesNotSeeThatItsThreadWasBorrowed) {
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(run_injected(
        process_, [](RemoteThread& thread, InjectorLink&) { return thread.call(SYS_getpid, {}); }));
    std::this_thread::sleep_for(2ms);
  }
  expect_it_waited();
}

TEST(ThreadStop, ADeadProcessIsAnError) {
  Victim victim([] { return 0; });
  const Process process = victim.process();
  victim.wait();
  const auto stopped = ThreadStop::stop(process);
  ASSERT_FALSE(stopped);
}

}  // namespace
}  // namespace vmsnap
