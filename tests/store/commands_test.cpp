// show, verify and export, as main would run them.
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <sstream>

#include "formats/command.h"
#include "formats/image_layout.h"
#include "tests/formats/test_image.h"

namespace vmsnap {
namespace {

class CommandsTest : public testing::Test {
 protected:
  CommandsTest() : image_(directory_.file("a.img")), raw_(directory_.file("a.raw")) {
    write_image(image_, pages_, {2, 700}, some_state(500));
  }

  Status run(std::vector<std::string> arguments) {
    out_.str("");
    CommandContext context{.out = out_, .err = err_, .run = {}};
    CLI::App app;
    add_image_commands(app, context);
    std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them
    try {
      app.parse(arguments);
    } catch (const CLI::ParseError& error) {
      app.exit(error, out_, err_);
      return fail(ErrorCode::usage, "{}", error.what());
    }
    return context.run();
  }

  void damage_first_frame() {
    const Fd fd = open_file(image_, O_RDWR).value();
    const std::byte wrong{0xff};
    ASSERT_TRUE(write_all_at(fd.get(), std::span(&wrong, 1), layout::frames_begin + 30, image_));
  }

  TempDirectory directory_;
  const std::string image_;
  const std::string raw_;
  const std::vector<PageBytes> pages_ = {text_page(1), zero_page(), text_page(2), random_page(3),
                                         text_page(1)};
  std::ostringstream out_;
  std::ostringstream err_;
};

TEST_F(CommandsTest, ShowJson) {
  ASSERT_TRUE(run({"show", "--json", image_}));
  const auto json = nlohmann::json::parse(out_.str());
  EXPECT_EQ(json["id"].get<std::string>().size(), 32u);
  EXPECT_EQ(json["file"], image_);
  EXPECT_EQ(json["version"], 1);
  EXPECT_EQ(json["created_unix_ms"], 1'732'140'700'123);
  const nlohmann::json pages = {{"total", 702}, {"zero", 698}, {"duplicate", 1}, {"stored", 3}};
  EXPECT_EQ(json["pages"], pages);
  EXPECT_EQ(json["bytes"]["guest"], 702 * page_size);
  EXPECT_EQ(json["bytes"]["image"], std::filesystem::file_size(image_));
  EXPECT_EQ(json["device_state_bytes"], 500);
  EXPECT_EQ(json["source"]["kind"], "test");
  EXPECT_EQ(json["regions"][1]["name"], "region1");
  EXPECT_EQ(json["regions"][1]["address"], nullptr);
  EXPECT_EQ(json["regions"][1]["length"], 700 * page_size);
  EXPECT_EQ(json["regions"][1]["raw_offset"], 2 * page_size);
}

TEST_F(CommandsTest, ShowText) {
  ASSERT_TRUE(run({"show", image_}));
  const std::string text = out_.str();
  EXPECT_NE(text.find("taken         2024-11-20 22:11:40.123 UTC\n"), std::string::npos) << text;
  EXPECT_NE(text.find("memory        2.7 MiB in 2 regions\n"), std::string::npos) << text;
  EXPECT_NE(text.find("pages         702 = 698 zero + 1 duplicate + 3 stored\n"),
            std::string::npos);
  EXPECT_NE(text.find("source        kind: test\n"), std::string::npos) << text;
  EXPECT_NE(text.find("-      2.7 MiB             0x2000  region1\n"), std::string::npos) << text;
}

TEST_F(CommandsTest, VerifyWhole) {
  ASSERT_TRUE(run({"verify", image_}));
  EXPECT_EQ(out_.str(), image_ + " is whole: 4 pages with data, 698 zero pages\n");
  ASSERT_TRUE(run({"verify", image_, "--json"}));
  EXPECT_EQ(nlohmann::json::parse(out_.str())["ok"], true);
}

TEST_F(CommandsTest, VerifyDamaged) {
  damage_first_frame();
  const Status status = run({"verify", image_});
  ASSERT_FALSE(status);
  EXPECT_EQ(exit_status(status.error().code()), 9);
  EXPECT_NE(out_.str().find("lost: region region0 offset 0x0 length 0x1000: "), std::string::npos)
      << out_.str();
  EXPECT_FALSE(run({"verify", image_, "--json"}));
  const auto json = nlohmann::json::parse(out_.str());
  EXPECT_EQ(json["ok"], false);
  EXPECT_EQ(json["pages"]["damaged"], 2);
  EXPECT_EQ(json["damaged"][1]["region"], "region1");
  EXPECT_EQ(json["damaged"][1]["offset"], 2 * page_size);
}

TEST_F(CommandsTest, ExportIsSparse) {
  ASSERT_TRUE(run({"export", image_, "--raw", raw_}));
  std::vector<std::byte> expected = join(pages_);
  expected.resize(702 * page_size);
  EXPECT_EQ(read_file(raw_), expected);
  struct stat status;
  ASSERT_EQ(::stat(raw_.c_str(), &status), 0);
  EXPECT_LT(status.st_blocks * 512, 100'000);
  EXPECT_EQ(out_.str(), raw_ + ": 2.7 MiB, of which 16.0 KiB are not holes\n");
}

TEST_F(CommandsTest, ExportToStandardOutput) {
  ASSERT_TRUE(run({"export", image_, "--raw", "-"}));
  std::vector<std::byte> expected = join(pages_);
  expected.resize(702 * page_size);
  const std::string text = out_.str();
  ASSERT_EQ(text.size(), expected.size());
  EXPECT_EQ(std::memcmp(text.data(), expected.data(), text.size()), 0);
}

TEST_F(CommandsTest, ExportOverwritesOnlyWithForce) {
  ASSERT_TRUE(write_small_file(raw_, "precious"));
  EXPECT_EQ(run({"export", image_, "--raw", raw_}).error().code(), ErrorCode::exists);
  EXPECT_EQ(read_small_file(raw_).value(), "precious");
  ASSERT_TRUE(run({"export", image_, "--raw", raw_, "--force"}));
  EXPECT_EQ(std::filesystem::file_size(raw_), 702 * page_size);
}

TEST_F(CommandsTest, ExportOfADamagedPageLeavesNothing) {
  damage_first_frame();
  const Status status = run({"export", image_, "--raw", raw_});
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code(), ErrorCode::damaged);
  EXPECT_EQ(status.error().message(),
            "cannot read the page at offset 0x0 of region region0: " + image_ +
                " is damaged: the checksum of the page frame at byte 4096 does not match");
  EXPECT_FALSE(std::filesystem::exists(raw_));
}

TEST_F(CommandsTest, HelpHasExamples) {
  for (const char* command : {"show", "verify", "export"}) {
    EXPECT_EQ(run({command, "--help"}).error().code(), ErrorCode::usage);
    EXPECT_NE(out_.str().find("Examples:\n  vmsnap "), std::string::npos) << out_.str();
  }
}

}  // namespace
}  // namespace vmsnap
