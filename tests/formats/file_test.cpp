// Files that appear whole or not at all.
#include "formats/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <thread>

#include "tests/formats/test_image.h"

namespace vmsnap {
namespace {

size_t files_in(const TempDirectory& directory) {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory.path())) {
    count += entry.exists() ? 1 : 0;
  }
  return count;
}

TEST(AtomicFile, AppearsAtCommit) {
  TempDirectory directory;
  const std::string path = directory.file("out");
  AtomicFile file = AtomicFile::create(path, false).value();
  EXPECT_TRUE(write_all(file.fd(), std::as_bytes(std::span("abc", 3)), path));
  EXPECT_FALSE(std::filesystem::exists(path));
  ASSERT_TRUE(file.commit());
  EXPECT_EQ(read_small_file(path).value(), "abc");
  EXPECT_EQ(files_in(directory), 1u);
}

TEST(AtomicFile, DisappearsWithoutCommit) {
  TempDirectory directory;
  { AtomicFile file = AtomicFile::create(directory.file("out"), false).value(); }
  EXPECT_EQ(files_in(directory), 0u);
}

TEST(AtomicFile, ReplacesOnlyWhenAsked) {
  TempDirectory directory;
  const std::string path = directory.file("out");
  ASSERT_TRUE(write_small_file(path, "old"));
  const auto refused = AtomicFile::create(path, false);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ErrorCode::exists);
  EXPECT_EQ(refused.error().message(), path + " exists already");
  EXPECT_EQ(refused.error().remedy(), "Choose another name, or give --force to replace it.");
  AtomicFile file = AtomicFile::create(path, true).value();
  ASSERT_TRUE(file.commit());
  EXPECT_EQ(read_small_file(path).value(), "");
}

// Somebody else's file, made between create and commit, is safe too.
TEST(AtomicFile, DoesNotReplaceAtCommitEither) {
  TempDirectory directory;
  const std::string path = directory.file("out");
  AtomicFile file = AtomicFile::create(path, false).value();
  ASSERT_TRUE(write_small_file(path, "theirs"));
  EXPECT_EQ(file.commit().error().code(), ErrorCode::exists);
  EXPECT_EQ(read_small_file(path).value(), "theirs");
}

TEST(AtomicFile, NeverReplacesWhatIsNotAFile) {
  TempDirectory directory;
  EXPECT_EQ(AtomicFile::create("/dev/null", true).error().message(),
            "/dev/null exists already and is not a regular file");
  EXPECT_EQ(AtomicFile::create(directory.path(), true).error().code(), ErrorCode::exists);
}

TEST(AtomicFile, AbandonedOnesAreRemoved) {
  TempDirectory directory;
  const std::string path = directory.file("out");
  const pid_t killed = ::fork();
  if (killed == 0) {
    auto file = AtomicFile::create(path, false);
    ::kill(::getpid(), SIGKILL);
  }
  ASSERT_EQ(::waitpid(killed, nullptr, 0), killed);
  EXPECT_EQ(files_in(directory), 1u);
  ASSERT_TRUE(write_small_file(directory.file(".out.vmsnap-notes"), "the user's"));
  AtomicFile file = AtomicFile::create(path, false).value();
  EXPECT_EQ(files_in(directory), 2u);
  AtomicFile second = AtomicFile::create(path, false).value();  // the first one lives
  EXPECT_EQ(files_in(directory), 3u);
  ASSERT_TRUE(file.commit());
  EXPECT_EQ(second.commit().error().code(), ErrorCode::exists);
}

TEST(AtomicFile, WritersOfOneNameDoNotRemoveEachOther) {
  TempDirectory directory;
  const std::string path = directory.file("out");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 100; ++i) {
        auto file = AtomicFile::create(path, true);
        ASSERT_TRUE(file) << file.error().message();
        const Status committed = file->commit();
        ASSERT_TRUE(committed) << committed.error().message();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(files_in(directory), 1u);
}

TEST(File, ShortFileIsDamaged) {
  TempDirectory directory;
  const std::string path = directory.file("short");
  ASSERT_TRUE(write_small_file(path, "12345"));
  const Fd fd = open_file(path, O_RDONLY).value();
  std::array<std::byte, 6> bytes;
  const Status read = read_exact_at(fd.get(), bytes, 0, path);
  ASSERT_FALSE(read);
  EXPECT_EQ(read.error().code(), ErrorCode::damaged);
  EXPECT_EQ(read.error().message(), path + " ends at byte 5: it is cut short");
  EXPECT_EQ(read_small_file(path, 4).error().code(), ErrorCode::damaged);
}

// What is acted upon, as root perhaps, must not be what somebody else wrote.
TEST(File, WhatIsOursIsNobodyElses) {
  TempDirectory directory;
  const std::string path = directory.file("record");
  ASSERT_TRUE(write_small_file(path, "ours"));
  EXPECT_EQ(read_own_file(path, 10).value(), "ours");
  EXPECT_EQ(read_own_file(path, 3).error().code(), ErrorCode::damaged);
  ASSERT_EQ(::symlink(path.c_str(), directory.file("link").c_str()), 0);
  EXPECT_EQ(read_own_file(directory.file("link"), 10).error().os_errno(), ELOOP);
  ASSERT_EQ(::chmod(path.c_str(), 0620), 0);
  EXPECT_EQ(read_own_file(path, 10).error().code(), ErrorCode::refused);
  ASSERT_EQ(::chmod(path.c_str(), 0644), 0);
  EXPECT_TRUE(read_own_file(path, 10));
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a file away";
  ASSERT_EQ(::chown(path.c_str(), 65534, static_cast<gid_t>(-1)), 0);
  EXPECT_EQ(read_own_file(path, 10).error().code(), ErrorCode::refused);
}

}  // namespace
}  // namespace vmsnap
