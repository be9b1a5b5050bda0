#include <sys/socket.h>

#include <fstream>

#include "restore/farm/clone_process.h"
#include "restore/farm/farm_dir.h"
#include "restore/farm/farm_link.h"
#include "tests/restore/test_image.h"

namespace vmsnap {
namespace {

TEST(FarmLink, KeepsMessagesWholeWithTheirDescriptors) {
  int ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), 0);
  const Fd ours(ends[0]);
  Fd theirs(ends[1]);
  ASSERT_TRUE(send_message(theirs.get(), {{"do", "a"}}, {0}));
  ASSERT_TRUE(send_message(theirs.get(), {{"do", "b"}}));
  const auto first = receive_message(ours.get(), std::chrono::seconds(1));
  ASSERT_TRUE(first && *first);
  EXPECT_EQ((*first)->json["do"], "a");
  EXPECT_EQ((*first)->descriptors.size(), 1U);
  const auto second = receive_message(ours.get(), std::chrono::seconds(1));
  EXPECT_EQ((*second)->json["do"], "b");
  EXPECT_FALSE(receive_message(ours.get(), std::chrono::milliseconds(1)));
  theirs.reset();
  const auto end = receive_message(ours.get(), std::chrono::seconds(1));
  ASSERT_TRUE(end);
  EXPECT_FALSE(*end);
  EXPECT_FALSE(send_message(ours.get(), {{"do", "c"}}));
}

TEST(FarmLink, RefusesWhatIsNoMessage) {
  int ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), 0);
  const Fd ours(ends[0]), theirs(ends[1]);
  for (const std::string& text : {std::string("nonsense"), std::string("[1]"), std::string("{"),
                                  std::string(150 << 10, 'x')}) {
    ASSERT_EQ(::send(theirs.get(), text.data(), text.size(), 0), static_cast<ssize_t>(text.size()));
    const auto message = receive_message(ours.get(), std::chrono::seconds(1));
    ASSERT_FALSE(message);
    EXPECT_EQ(message.error().code(), ErrorCode::damaged);
  }
}

TEST(FarmLink, DoesNotWaitForWhoNeverReads) {
  const MessagePair pair = *message_pair();
  const nlohmann::json long_one = {{"do", std::string(20 << 10, 'x')}};
  Status sent;
  for (int i = 0; i < 10000 && sent; ++i) sent = send_message(pair.ours.get(), long_one);
  ASSERT_FALSE(sent);
  EXPECT_EQ(sent.error().code(), ErrorCode::vm);
}

TEST(FarmDir, WritesAndReadsItsRecord) {
  const testing::TemporaryDirectory folder;
  const FarmDir dir = *FarmDir::make(folder / "farm");
  EXPECT_EQ(FarmDir::open(folder / "farm").error().code(), ErrorCode::usage);
  ASSERT_TRUE(dir.write({"/a/b.img", "id", Prefetch::working_set, 1 << 20, 42, 7}));
  const FarmRecord record = *FarmDir::open(folder / "farm")->read();
  EXPECT_EQ(record.image, "/a/b.img");
  EXPECT_EQ(record.image_id, "id");
  EXPECT_EQ(record.prefetch, Prefetch::working_set);
  EXPECT_EQ(record.memory, 1U << 20);
  EXPECT_EQ(record.keeper_pid, 42);
  EXPECT_EQ(record.unreadable, 7U);
}

TEST(FarmDir, BelievesNothing) {
  const testing::TemporaryDirectory folder;
  const FarmDir dir = *FarmDir::make(folder.path());
  for (const char* text :
       {"", "[]", "{}", R"({"version":1})", R"({"version":"1"})",
        R"({"version":1,"image":1,"image_id":"","prefetch":"all","memory":0,"keeper_pid":1})",
        R"({"version":1,"image":"","image_id":"","prefetch":"all","memory":-1,"keeper_pid":1})",
        R"({"version":1,"image":"","image_id":"","prefetch":"all","memory":0,"keeper_pid":99999999})"}) {
    std::ofstream(dir.file("farm.json")) << text;
    const auto record = dir.read();
    ASSERT_FALSE(record) << text;
    EXPECT_EQ(record.error().code(), ErrorCode::damaged) << text;
  }
  std::ofstream(dir.file("farm.json")) << R"({"version":2})";
  EXPECT_EQ(dir.read().error().code(), ErrorCode::unsupported);
}

TEST(FarmDir, NumbersItsClones) {
  const testing::TemporaryDirectory folder;
  const FarmDir dir = *FarmDir::make(folder.path());
  for (int i = 1; i <= 11; ++i) EXPECT_EQ(*dir.new_clone(), std::to_string(i));
  std::filesystem::create_directory(folder / "012");
  std::filesystem::create_directory(folder / "7x");
  std::filesystem::remove(folder / "3");
  EXPECT_EQ(dir.clones().size(), 10U);
  EXPECT_EQ(dir.clones().back(), "11");
  EXPECT_EQ(*dir.new_clone(), "12");
}

TEST(FarmDir, OneKeeperAtATime) {
  const testing::TemporaryDirectory folder;
  const FarmDir dir = *FarmDir::make(folder.path());
  const auto held = dir.lock();
  ASSERT_TRUE(held);
  EXPECT_EQ(dir.lock().error().code(), ErrorCode::exists);
}

TEST(Clones, NumberInArguments) {
  EXPECT_EQ(with_clone_number("tap{clone},mac={clone}", "12"), "tap12,mac=12");
  EXPECT_EQ(with_clone_number("{clon}", "1"), "{clon}");
}

}  // namespace
}  // namespace vmsnap
