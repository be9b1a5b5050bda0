// The handshake of `vmsnap serve`: what is taken, and the whole text of every
// refusal.
#include "restore/firecracker.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <filesystem>
#include <random>
#include <thread>

namespace vmsnap {
namespace {

constexpr uint64_t image_pages = 4096;  // 16 MiB

std::string region(const std::string& members) { return "[{" + members + "}]"; }

TEST(Handshake, RegionsAreRead) {
  const auto ranges = parse_handshake(
      R"([{"base_host_virt_addr":1073741824,"size":8388608,"offset":4096,"page_size":4096,
           "page_size_kib":4096,"something_new":{"a":[1]}},
          {"base_host_virt_addr":2147483648,"size":4194304,"offset":12582912,"page_size":2097152}])",
      image_pages);
  ASSERT_TRUE(ranges) << ranges.error().message();
  ASSERT_EQ(ranges->size(), 2u);
  EXPECT_EQ((*ranges)[0].range.start, RemotePtr(1 << 30));
  EXPECT_EQ((*ranges)[0].range.length, 8u << 20);
  EXPECT_EQ((*ranges)[0].first_page, 1u);
  EXPECT_EQ((*ranges)[0].unit, 4096u);
  EXPECT_EQ((*ranges)[1].first_page, 3072u);
  EXPECT_EQ((*ranges)[1].unit, 2u << 20);
}

TEST(Handshake, PageSizes) {
  const auto unit = [](const std::string& members) -> uint64_t {
    const auto ranges = parse_handshake(
        region(R"("base_host_virt_addr":1073741824,"size":4194304,"offset":0)" + members),
        image_pages);
    return ranges ? (*ranges)[0].unit : 0;
  };
  EXPECT_EQ(unit(""), 4096u);
  EXPECT_EQ(unit(R"(,"page_size":4096)"), 4096u);
  EXPECT_EQ(unit(R"(,"page_size_kib":4096)"), 4096u) << "bytes, as Firecracker sends them";
  EXPECT_EQ(unit(R"(,"page_size_kib":2097152)"), 2u << 20);
  EXPECT_EQ(unit(R"(,"page_size_kib":4)"), 4096u) << "KiB, as the name says";
  EXPECT_EQ(unit(R"(,"page_size_kib":2048)"), 2u << 20);
  EXPECT_EQ(unit(R"(,"page_size":2097152,"page_size_kib":2048)"), 2u << 20);
}

struct BadMessage {
  const char* message;
  const char* error;  // after "bad handshake: "
};

const BadMessage bad_messages[] = {
    {"", "the message is not JSON"},
    {"[", "the message is not JSON"},
    {"[{]}", "the message is not JSON"},
    {"[]]", "the message is not JSON"},
    {"\xff\xfe", "the message is not JSON"},
    {"{}", "the message is not a JSON array"},
    {"null", "the message is not a JSON array"},
    {"17", "the message is not a JSON array"},
    {"[]", "it names no region"},
    {"[1]", "region 0 is not a JSON object"},
    {"[[]]", "region 0 is not a JSON object"},
    {"[null]", "region 0 is not a JSON object"},
    {"[{}]", "region 0: \"base_host_virt_addr\" is missing"},
    {R"([{"base_host_virt_addr":4096}])", "region 0: \"size\" is missing"},
    {R"([{"base_host_virt_addr":4096,"size":4096}])", "region 0: \"offset\" is missing"},
    {R"([{"base_host_virt_addr":"4096","size":4096,"offset":0}])",
     "region 0: \"base_host_virt_addr\" is not a whole number"},
    {R"([{"base_host_virt_addr":-4096,"size":4096,"offset":0}])",
     "region 0: \"base_host_virt_addr\" is not a whole number"},
    {R"([{"base_host_virt_addr":4096.0,"size":4096,"offset":0}])",
     "region 0: \"base_host_virt_addr\" is not a whole number"},
    {R"([{"base_host_virt_addr":4096,"size":1e3,"offset":0}])",
     "region 0: \"size\" is not a whole number"},
    {R"([{"base_host_virt_addr":4096,"size":4096,"offset":true}])",
     "region 0: \"offset\" is not a whole number"},
    {R"([{"base_host_virt_addr":99999999999999999999999,"size":4096,"offset":0}])",
     "region 0: \"base_host_virt_addr\" is not a whole number"},
    {R"([{"base_host_virt_addr":0,"size":4096,"offset":0}])", "region 0: it begins at address 0"},
    {R"([{"base_host_virt_addr":4096,"size":0,"offset":0}])", "region 0: it is empty"},
    {R"([{"base_host_virt_addr":4097,"size":4096,"offset":0}])",
     "region 0: 0x1001 (+0x1000) is not a whole number of 4096 byte pages"},
    {R"([{"base_host_virt_addr":4096,"size":4095,"offset":0}])",
     "region 0: 0x1000 (+0xfff) is not a whole number of 4096 byte pages"},
    {R"([{"base_host_virt_addr":4096,"size":2097152,"offset":0,"page_size":2097152}])",
     "region 0: 0x1000 (+0x200000) is not a whole number of 2097152 byte pages"},
    {R"([{"base_host_virt_addr":4096,"size":4096,"offset":1}])",
     "region 0: offset 0x1 is not page aligned"},
    {R"([{"base_host_virt_addr":18446744073709547520,"size":8192,"offset":0}])",
     "region 0: it wraps around address 0"},
    {R"([{"base_host_virt_addr":4096,"size":4096,"offset":16777216}])",
     "region 0: bytes 0x1000000 (+0x1000) are not within the image of 0x1000000 bytes"},
    {R"([{"base_host_virt_addr":4096,"size":8192,"offset":16773120}])",
     "region 0: bytes 0xfff000 (+0x2000) are not within the image of 0x1000000 bytes"},
    {R"([{"base_host_virt_addr":4096,"size":4096,"offset":18446744073709547520}])",
     "region 0: bytes 0xfffffffffffff000 (+0x1000) are not within the image of 0x1000000 bytes"},
    {R"([{"base_host_virt_addr":4096,"size":18446744073709543424,"offset":0}])",
     "region 0: bytes 0x0 (+0xffffffffffffe000) are not within the image of 0x1000000 bytes"},
    {R"([{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":3}])",
     "region 0: pages of 3 bytes are not served, only 4096 and 2097152"},
    {R"([{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":0}])",
     "region 0: pages of 0 bytes are not served, only 4096 and 2097152"},
    {R"([{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":"4096"}])",
     "region 0: \"page_size\" is not a whole number"},
    {R"([{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"page_size_kib":2048}])",
     "region 0: \"page_size\" (4096) and \"page_size_kib\" (2097152) do not agree"},
    {R"([{"base_host_virt_addr":4096,"size":8192,"offset":0},
         {"base_host_virt_addr":8192,"size":4096,"offset":8192}])",
     "region 0 and region 1 overlap in memory"},
    {R"([{"base_host_virt_addr":4096,"size":4096,"offset":0},
         {"base_host_virt_addr":4096,"size":4096,"offset":4096}])",
     "region 0 and region 1 overlap in memory"},
    {R"([{"base_host_virt_addr":4096,"size":8192,"offset":0},
         {"base_host_virt_addr":65536,"size":4096,"offset":4096}])",
     "region 0 and region 1 overlap in the image"},
    {R"([{"base_host_virt_addr":4096,"size":4096,"offset":0},7])", "region 1 is not a JSON object"},
};

TEST(Handshake, BadMessagesAreRefusedWithTheReason) {
  for (const BadMessage& bad : bad_messages) {
    const auto ranges = parse_handshake(bad.message, image_pages);
    ASSERT_FALSE(ranges) << bad.message;
    EXPECT_EQ(ranges.error().code(), ErrorCode::usage);
    EXPECT_EQ(ranges.error().message(), std::string("bad handshake: ") + bad.error) << bad.message;
  }
}

TEST(Handshake, LimitsAreKept) {
  std::string many = "[";
  for (size_t i = 0; i < handshake_max_regions + 1; ++i) many += i ? ",{}" : "{}";
  EXPECT_EQ(parse_handshake(many + "]", image_pages).error().message(),
            "bad handshake: it names 1025 regions, more than 1024");
  const std::string large(handshake_max_bytes + 1, ' ');
  EXPECT_EQ(parse_handshake(large, image_pages).error().message(),
            "bad handshake: the message has more than 262144 bytes");
  EXPECT_FALSE(parse_handshake(std::string(handshake_max_bytes, '['), image_pages));
}

TEST(ArrayScannerTest, FindsTheEnd) {
  using State = ArrayScanner::State;
  ArrayScanner scanner;
  EXPECT_EQ(scanner.add(" \n["), State::incomplete);
  EXPECT_EQ(scanner.add(R"({"a]\"": [1, "]"], )"), State::incomplete);
  EXPECT_EQ(scanner.add(R"("b\\": {}})"), State::incomplete);
  EXPECT_EQ(scanner.add("] "), State::complete);
  EXPECT_FALSE(scanner.followed());
  EXPECT_EQ(scanner.add("x"), State::complete);
  EXPECT_TRUE(scanner.followed());
  EXPECT_EQ(ArrayScanner().add("{"), State::not_an_array);
}

// A connected pair of sockets and what a VMM would do with its end.
class Connection {
 public:
  Connection() {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) std::abort();
    vmm_ = Fd(ends[0]);
    ours_ = Fd(ends[1]);
  }
  void send(const std::string& text, const std::vector<int>& descriptors = {}) {
    iovec bytes = {const_cast<char*>(text.data()), text.size()};
    alignas(cmsghdr) char control[CMSG_SPACE(32 * sizeof(int))] = {};
    msghdr header = {};
    header.msg_iov = &bytes;
    header.msg_iovlen = 1;
    if (!descriptors.empty()) {
      header.msg_control = control;
      header.msg_controllen = CMSG_SPACE(descriptors.size() * sizeof(int));
      cmsghdr* part = CMSG_FIRSTHDR(&header);
      part->cmsg_level = SOL_SOCKET;
      part->cmsg_type = SCM_RIGHTS;
      part->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
      std::memcpy(CMSG_DATA(part), descriptors.data(), descriptors.size() * sizeof(int));
    }
    ASSERT_EQ(::sendmsg(vmm_.get(), &header, MSG_NOSIGNAL), static_cast<ssize_t>(text.size()));
  }
  void close() { vmm_.reset(); }
  Result<Handshake> receive(std::chrono::milliseconds limit = std::chrono::seconds(60)) {
    return receive_handshake(ours_.get(), image_pages, limit);
  }

 private:
  Fd vmm_, ours_;
};

Fd make_uffd() {
  return Fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | 1 /*user mode*/)));
}

size_t open_descriptors() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    ++count;
  return count;
}

const std::string good = R"([{"base_host_virt_addr":4096,"size":4096,"offset":0}])";

TEST(HandshakeOverASocket, InOnePiece) {
  Connection connection;
  const Fd uffd = make_uffd();
  connection.send(good, {uffd.get()});
  const auto handshake = connection.receive();
  ASSERT_TRUE(handshake) << handshake.error().message();
  EXPECT_TRUE(handshake->uffd);
  EXPECT_EQ(handshake->ranges.size(), 1u);
}

TEST(HandshakeOverASocket, InPiecesOfOneByte) {
  for (const size_t with_descriptor : {size_t{0}, good.size() - 1}) {
    Connection connection;
    const Fd uffd = make_uffd();
    std::thread vmm([&] {
      for (size_t i = 0; i < good.size(); ++i) {
        connection.send(good.substr(i, 1),
                        i == with_descriptor ? std::vector{uffd.get()} : std::vector<int>{});
      }
    });
    const auto handshake = connection.receive();
    vmm.join();
    EXPECT_TRUE(handshake) << handshake.error().message();
  }
}

TEST(HandshakeOverASocket, BadOnesAreRefusedAndLeakNothing) {
  const Fd uffd = make_uffd(), event(::eventfd(0, EFD_CLOEXEC));
  const size_t before = open_descriptors();
  struct Case {
    std::string text;
    std::vector<int> descriptors;
    std::string error;
  };
  const std::vector<Case> cases = {
      {good, {}, "no userfaultfd came with it"},
      {good, {event.get()}, "the descriptor that came with it is no userfaultfd"},
      {good, {uffd.get(), uffd.get()}, "2 descriptors came with it, not one"},
      {good, std::vector<int>(20, uffd.get()), "too many descriptors came with it"},
      {good + "x", {uffd.get()}, "something follows the JSON array"},
      {"GET / HTTP/1.1", {uffd.get()}, "the message is not a JSON array"},
      {"[{\"a\"]", {uffd.get()}, "the connection was closed after 6 bytes"},
      {"[{\"a\"]]", {uffd.get()}, "the message is not JSON"},
      {"[", {uffd.get()}, "the connection was closed after 1 bytes"},
  };
  for (const Case& bad : cases) {
    Connection connection;
    connection.send(bad.text, bad.descriptors);
    connection.close();
    const auto handshake = connection.receive();
    ASSERT_FALSE(handshake) << bad.error;
    EXPECT_EQ(handshake.error().message(), "bad handshake: " + bad.error);
  }
  EXPECT_EQ(open_descriptors(), before);
}

TEST(HandshakeOverASocket, DescriptorsInTwoPieces) {
  Connection connection;
  const Fd uffd = make_uffd();
  connection.send(good.substr(0, 5), {uffd.get()});
  connection.send(good.substr(5), {uffd.get()});
  EXPECT_EQ(connection.receive().error().message(),
            "bad handshake: 2 descriptors came with it, not one");
}

TEST(HandshakeOverASocket, MoreThanOneDescriptorIsNotWaitedOn) {
  Connection connection;
  const Fd uffd = make_uffd();
  connection.send("[", {uffd.get(), uffd.get()});
  EXPECT_EQ(connection.receive().error().message(),
            "bad handshake: 2 descriptors came with it, not one");
}

TEST(HandshakeOverASocket, TooLargeOrTooSlow) {
  {
    Connection connection;
    std::thread vmm([&] {
      connection.send("[" + std::string(100000, ' '));
      connection.send(std::string(handshake_max_bytes - 100000, ' '));
      connection.close();
    });
    EXPECT_EQ(connection.receive().error().message(),
              "bad handshake: the message has more than 262144 bytes");
    vmm.join();
  }
  Connection connection;
  connection.send("[");
  EXPECT_EQ(connection.receive(std::chrono::milliseconds(1)).error().message(),
            "bad handshake: it is not whole within the time limit");
}

TEST(HandshakeOverASocket, RandomOnesAreRefusedOrValid) {
  std::mt19937_64 random(4);
  const std::vector<std::string> words = {"[",
                                          "]",
                                          "{",
                                          "}",
                                          ",",
                                          ":",
                                          "\"",
                                          "\\",
                                          "0",
                                          "-1",
                                          "4096",
                                          "18446744073709551615",
                                          "1e9",
                                          "\"base_host_virt_addr\":",
                                          "\"size\":",
                                          "\"offset\":",
                                          "\"page_size\":",
                                          "null",
                                          " ",
                                          "\xff",
                                          R"({"base_host_virt_addr":4096,"size":4096,"offset":0})"};
  for (int round = 0; round < 3000; ++round) {
    std::string text = "[";
    for (uint64_t n = random() % 12; n > 0; --n) text += words[random() % words.size()];
    if (random() % 2) text += "]";
    Connection connection;
    const Fd uffd = make_uffd();
    std::vector<int> descriptors(random() % 3, uffd.get());
    connection.send(text, descriptors);
    connection.close();
    const auto handshake = connection.receive();
    if (!handshake) {
      EXPECT_TRUE(handshake.error().message().starts_with("bad handshake: "))
          << text << ": " << handshake.error().message();
      continue;
    }
    for (const ServedRange& range : handshake->ranges) {
      EXPECT_LE(range.first_page + range.page_count(), image_pages) << text;
      EXPECT_GT(range.page_count(), 0u) << text;
    }
  }
}

}  // namespace
}  // namespace vmsnap
