#include "restore/guest_agent.h"

#include <sys/socket.h>
#include <sys/un.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "tests/restore/test_image.h"

namespace vmsnap {
namespace {

// Answers each line with what `reply` says; "" ends the conversation. As the real
// one does, it has half a command from before, until 0xff makes an end of it.
class FakeAgent {
 public:
  FakeAgent(std::string path, std::function<std::string(const nlohmann::json&)> reply)
      : path_(std::move(path)), listener_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path_.c_str(), sizeof address.sun_path - 1);
    EXPECT_EQ(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    EXPECT_EQ(::listen(listener_.get(), 1), 0);
    thread_ = std::thread([this, reply = std::move(reply)] {
      const Fd link(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      std::string line = "{\"execute\": \"guest-pi";
      for (char c; ::read(link.get(), &c, 1) == 1;) {
        line += c;
        if (c != '\n' && c != '\xff') continue;
        const std::string answer = c == '\n' ? reply(nlohmann::json::parse(line, nullptr, false))
                                             : "{\"error\": {\"desc\": \"JSON parse error\"}}\n";
        line.clear();
        if (answer.empty() || !write_all(link.get(), std::as_bytes(std::span(answer)), "x")) return;
      }
    });
  }
  ~FakeAgent() { thread_.join(); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  Fd listener_;
  std::thread thread_;
};

std::string sync_answer(const nlohmann::json& command) {
  return "half a line\xff{\"return\": " + command["arguments"]["id"].dump() + "}\n";
}

TEST(GuestAgent, SetsTheClock) {
  const testing::TemporaryDirectory folder;
  int64_t time = 0;
  {
    const FakeAgent agent(folder / "a.sock", [&](const nlohmann::json& command) -> std::string {
      if (command["execute"] == "guest-sync-delimited") return sync_answer(command);
      time = command["arguments"]["time"];
      return "{\"return\": {}}\n";
    });
    const Status set = set_guest_clock(agent.path());
    EXPECT_TRUE(set) << set.error().message();
  }
  EXPECT_GT(time, int64_t{1700000000} * 1000000000);
}

TEST(GuestAgent, SaysWhatTheAgentSaid) {
  const testing::TemporaryDirectory folder;
  const FakeAgent agent(folder / "a.sock", [&](const nlohmann::json& command) -> std::string {
    if (command["execute"] == "guest-sync-delimited") return sync_answer(command);
    return "{\"error\": {\"desc\": \"no hwclock\"}}\n";
  });
  const Status set = set_guest_clock(agent.path());
  ASSERT_FALSE(set);
  EXPECT_EQ(set.error().code(), ErrorCode::vm);
  EXPECT_NE(set.error().message().find("no hwclock"), std::string::npos);
}

TEST(GuestAgent, IsNotWaitedForForEver) {
  const testing::TemporaryDirectory folder;
  {
    const FakeAgent silent(folder / "a.sock", [](const nlohmann::json&) { return "nonsense\n"; });
    EXPECT_FALSE(set_guest_clock(silent.path(), std::chrono::milliseconds(50)));
  }
  {
    const FakeAgent closing(folder / "b.sock", [](const nlohmann::json&) { return ""; });
    EXPECT_FALSE(set_guest_clock(closing.path()));
  }
  const FakeAgent endless(folder / "c.sock",
                          [](const nlohmann::json&) { return std::string(200 << 10, 'x'); });
  EXPECT_FALSE(set_guest_clock(endless.path()));
  EXPECT_FALSE(set_guest_clock(folder / "nobody.sock"));
}

TEST(GuestAgent, IsFoundInTheCommandLine) {
  const std::vector<std::string> with = {
      "-chardev", "socket,path=/run/x/qga0.sock,server=on,wait=off,id=qga0", "-device",
      "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"};
  EXPECT_EQ(guest_agent_socket(with), "/run/x/qga0.sock");
  EXPECT_EQ(guest_agent_socket(std::span(with).first(2)), std::nullopt);
  EXPECT_EQ(guest_agent_socket(std::span(with).last(2)), std::nullopt);
}

}  // namespace
}  // namespace vmsnap
