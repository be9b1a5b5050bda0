// Where a key comes from: options, environment, files, commands.
#include "formats/key_source.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>

#include "formats/log.h"
#include "tests/formats/crypto_test.h"
#include "tests/formats/test_image.h"

namespace vmsnap {
namespace {

class KeySourceTest : public testing::Test {
 protected:
  KeySourceTest() {
    clear_environment();
    set_log_sink([this](LogLevel level, std::string_view line) {
      if (level == LogLevel::warning) warnings_ += line;
    });
  }
  ~KeySourceTest() override {
    clear_environment();
    set_log_sink({});
  }

  static void clear_environment() {
    for (const char* name : {"VMSNAP_PASSPHRASE", "VMSNAP_KEY_FILE", "VMSNAP_PASSPHRASE_FILE",
                             "VMSNAP_PASSPHRASE_COMMAND"}) {
      ::unsetenv(name);
    }
  }

  std::string write(std::string_view contents, mode_t mode = 0600) {
    const std::string path = directory_.file("key");
    EXPECT_TRUE(write_small_file(path, contents, mode));
    return path;
  }

  // "passphrase: abc", or what is wrong.
  static std::string read(const KeySource& source) {
    const auto key = read_key(source);
    if (!key) return key.error().message();
    if (!*key) return "nothing";
    const auto bytes = (*key)->secret.bytes();
    const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    return ((*key)->kind == KeyKind::passphrase ? "passphrase: " : "key file: ") + text;
  }
  static ErrorCode code(const KeySource& source) {
    const auto key = read_key(source);
    return key ? ErrorCode::io : key.error().code();
  }
  static std::string command(const std::string& text) {
    return read(
        {.key_file = {}, .passphrase_file = {}, .passphrase_command = text, .passphrase_fd = {}});
  }
  static KeySource key_file(const std::string& path) {
    KeySource source;
    source.key_file = path;
    return source;
  }
  static KeySource passphrase_file(const std::string& path) {
    KeySource source;
    source.passphrase_file = path;
    return source;
  }
  static KeySource descriptor(int fd) {
    KeySource source;
    source.passphrase_fd = fd;
    return source;
  }

  TempDirectory directory_;
  std::string warnings_;
};

TEST_F(KeySourceTest, NothingIsNoError) { EXPECT_EQ(read({}), "nothing"); }

TEST_F(KeySourceTest, KeyFileIsTakenAsItIs) {
  const std::string contents("a\nb\0c\n", 6);
  EXPECT_EQ(read(key_file(write(contents))), "key file: " + contents);
  EXPECT_EQ(warnings_, "");
  const std::string largest(max_key_file, 'x');
  EXPECT_EQ(read(key_file(write(largest))), "key file: " + largest);
}

TEST_F(KeySourceTest, KeyFilesThatAreNone) {
  const std::string path = write("");
  EXPECT_EQ(read(key_file(path)), "the key file " + path + " is empty");
  EXPECT_EQ(code(key_file(path)), ErrorCode::usage);
  EXPECT_EQ(read(key_file(write(std::string(max_key_file + 1, 'x')))),
            "the key file " + path + " is larger than 1 MiB");
  EXPECT_EQ(read(key_file("/nowhere/key")), "cannot open /nowhere/key: No such file or directory");
  EXPECT_EQ(read(key_file(directory_.path())),
            "cannot read " + directory_.path() + ": Is a directory");
}

TEST_F(KeySourceTest, WarnsOfFilesThatOthersCanRead) {
  const std::string path = write("abc", 0640);
  EXPECT_EQ(read(key_file(path)), "key file: abc");
  EXPECT_EQ(warnings_, path +
                           " holds a secret, but others than its owner have access to it "
                           "(mode 640): chmod 600 it");
  warnings_.clear();
  EXPECT_EQ(read(passphrase_file(path)), "passphrase: abc");
  EXPECT_NE(warnings_, "");
}

TEST_F(KeySourceTest, PassphraseIsTheFirstLine) {
  for (const char* contents : {"a b ", "a b \n", "a b \nc\n", "a b \n\n"}) {
    EXPECT_EQ(read(passphrase_file(write(contents))), "passphrase: a b ");
  }
  const std::string path = write("\nsecond\n");
  EXPECT_EQ(read(passphrase_file(path)), path + " gives an empty passphrase");
  EXPECT_EQ(code(passphrase_file(path)), ErrorCode::usage);
  write("");
  EXPECT_EQ(code(passphrase_file(path)), ErrorCode::usage);
}

TEST_F(KeySourceTest, PassphraseLengthIsBounded) {
  const std::string longest(max_passphrase, 'x');
  const std::string path = write(longest + "\nmore");
  EXPECT_EQ(read(passphrase_file(path)), "passphrase: " + longest);
  write(longest + "x");
  EXPECT_EQ(read(passphrase_file(path)),
            "the first line of " + path + " is longer than 4096 bytes");
  ::setenv("VMSNAP_PASSPHRASE", (longest + "x").c_str(), 1);
  EXPECT_EQ(read({}), "VMSNAP_PASSPHRASE is longer than 4096 bytes");
}

TEST_F(KeySourceTest, DescriptorIsReadToTheEndOfTheLineOnly) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const Fd output(ends[0]), input(ends[1]);
  ASSERT_TRUE(write_all(input.get(), bytes_of("abc\nfor others"), "pipe"));
  EXPECT_EQ(read(descriptor(output.get())), "passphrase: abc");
  char rest[20];
  EXPECT_EQ(::read(output.get(), rest, sizeof rest), 10);
  EXPECT_NE(::fcntl(output.get(), F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_EQ(read(descriptor(9999)), "cannot read file descriptor 9999: Bad file descriptor");
}

TEST_F(KeySourceTest, Command) {
  EXPECT_EQ(command("echo abc; echo def"), "passphrase: abc");
  // More than a pipe holds: it is read to the end.
  EXPECT_EQ(command("echo abc; head -c 300000 /dev/zero"), "passphrase: abc");
  EXPECT_EQ(command("echo abc; exit 3"),
            "the passphrase command 'echo abc; exit 3' exited with status 3");
  EXPECT_EQ(command("kill -9 $$"), "the passphrase command 'kill -9 $$' was ended by signal 9");
  EXPECT_EQ(command("true"), "the passphrase command 'true' gives an empty passphrase");
  EXPECT_EQ(command("head -c 5000 /dev/zero"),
            "the first line of the passphrase command 'head -c 5000 /dev/zero' is longer than 4096 "
            "bytes");
}

TEST_F(KeySourceTest, OneSourceOnly) {
  KeySource source = key_file(write("abc"));
  source.passphrase_command = "echo abc";
  EXPECT_EQ(code(source), ErrorCode::usage);
  ::setenv("VMSNAP_PASSPHRASE", "a", 1);
  ::setenv("VMSNAP_KEY_FILE", "b", 1);
  EXPECT_EQ(read({}), "more than one key is in the environment");
  // What is given hides the environment.
  EXPECT_EQ(read(key_file(write("abc"))), "key file: abc");
}

TEST_F(KeySourceTest, Environment) {
  const auto with = [](const char* name, const std::string& value) {
    clear_environment();
    ::setenv(name, value.c_str(), 1);
    return read({});
  };
  EXPECT_EQ(with("VMSNAP_PASSPHRASE", "a\nb"), "passphrase: a\nb");
  EXPECT_EQ(with("VMSNAP_PASSPHRASE", ""), "VMSNAP_PASSPHRASE is set, but empty");
  EXPECT_EQ(with("VMSNAP_PASSPHRASE_COMMAND", "echo abc"), "passphrase: abc");
  const std::string path = write("abc\n");
  EXPECT_EQ(with("VMSNAP_KEY_FILE", path), "key file: abc\n");
  EXPECT_EQ(with("VMSNAP_PASSPHRASE_FILE", path), "passphrase: abc");
  EXPECT_EQ(with("VMSNAP_KEY_FILE", ""), "VMSNAP_KEY_FILE is set, but empty");
}

TEST_F(KeySourceTest, Options) {
  const auto parse = [](std::vector<std::string> arguments) {
    CLI::App app;
    KeySource source;
    add_key_options(app, source);
    std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them
    app.parse(arguments);
    return source;
  };
  EXPECT_EQ(parse({"--key-file", "a"}).key_file, "a");
  EXPECT_EQ(parse({"--passphrase-file", "b"}).passphrase_file, "b");
  EXPECT_EQ(parse({"--passphrase-command", "echo c"}).passphrase_command, "echo c");
  EXPECT_EQ(parse({"--passphrase-fd", "4"}).passphrase_fd, 4);
  EXPECT_FALSE(parse({}).key_file);
  EXPECT_THROW(parse({"--passphrase-fd", "-1"}), CLI::ParseError);
}

}  // namespace
}  // namespace vmsnap
