#include "snap/vmm/unix_socket.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <atomic>
#include <filesystem>
#include <thread>
#include <vector>

#include "snap/vmm/qmp.h"
#include "tests/formats/test_image.h"

namespace vmsnap {
namespace {

TEST(UnixSocket, IsThereOnceItCanBeConnectedTo) {
  const TempDirectory directory;
  const std::string path = directory.file("s");
  std::atomic<bool> stop = false;
  std::atomic<int> refused = 0;
  std::thread client([&] {
    while (!stop) {
      const auto connected = connect_to_socket(path, SOCK_STREAM);
      if (!connected && connected.error().os_errno() == ECONNREFUSED) ++refused;
    }
  });
  std::vector<Result<Fd>> listeners;  // until the client has ended, for it may be on its way to one
  for (int i = 0; i < 300; ++i) {
    listeners.push_back(listen_on_socket(path, SOCK_STREAM, 1000));
    std::filesystem::remove(path);
  }
  stop = true;
  client.join();
  for (const auto& listener : listeners) EXPECT_TRUE(listener) << listener.error().message();
  EXPECT_EQ(refused, 0);
}

// As a monitor is whose one client stays, and for which others have waited.
TEST(UnixSocket, NobodyWaitsForEverToBeTaken) {
  const TempDirectory directory;
  const std::string path = directory.file("s");
  const auto listener = listen_on_socket(path, SOCK_STREAM, 1);
  ASSERT_TRUE(listener);
  std::vector<Fd> waiting;
  for (int i = 0; i < 100; ++i) {
    auto connected = connect_to_socket(path, SOCK_STREAM, std::chrono::milliseconds(20));
    if (!connected) {
      EXPECT_EQ(connected.error().os_errno(), EAGAIN);
      break;
    }
    waiting.push_back(*std::move(connected));
  }
  EXPECT_GE(waiting.size(), 1u);
  EXPECT_LT(waiting.size(), 100u);
  const auto monitor = Qmp::connect(path, std::chrono::milliseconds(300));
  ASSERT_FALSE(monitor);
  EXPECT_EQ(monitor.error().code(), ErrorCode::vm);
  EXPECT_NE(monitor.error().remedy().find("Another program"), std::string::npos);
}

TEST(UnixSocket, IsOfItsOwnerAlone) {
  const TempDirectory directory;
  const auto listener = listen_on_socket(directory.file("s"), SOCK_STREAM, 1);
  ASSERT_TRUE(listener);
  struct stat about = {};
  ASSERT_EQ(::stat(directory.file("s").c_str(), &about), 0);
  EXPECT_EQ(about.st_mode, S_IFSOCK | 0600);
}

TEST(UnixSocket, TakesNothingAwayAndLeavesNothing) {
  const TempDirectory directory;
  ASSERT_TRUE(write_small_file(directory.file("s"), "x"));
  const auto listener = listen_on_socket(directory.file("s"), SOCK_STREAM, 1);
  ASSERT_FALSE(listener);
  EXPECT_EQ(listener.error().os_errno(), EEXIST);
  EXPECT_EQ(*read_small_file(directory.file("s")), "x");
  std::filesystem::remove(directory.file("s"));
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(UnixSocket, SaysHowLongItsNameMayBe) {
  const auto listener = listen_on_socket(std::string(99, 'x'), SOCK_STREAM, 1);
  ASSERT_FALSE(listener);
  EXPECT_EQ(listener.error().code(), ErrorCode::usage);
  EXPECT_NE(listener.error().message().find("too long (at most 98 bytes)"), std::string::npos);
}

}  // namespace
}  // namespace vmsnap
