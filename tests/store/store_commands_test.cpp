// list, rm and key, as main would run them.
#include "formats/store/store_commands.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <sstream>

#include "formats/clock.h"
#include "formats/command.h"
#include "formats/store/key_command.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

class StoreCommands : public StoreTest {
 protected:
  Status run(std::vector<std::string> arguments) {
    out_.str("");
    CommandContext context{.out = out_, .err = out_, .run = {}};
    CLI::App app;
    add_store_commands(app, context);
    add_key_command(app, context);
    arguments.insert(arguments.end(), {"--store", options_.directory});
    std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them
    app.parse(arguments);
    return context.run();
  }

  std::ostringstream out_;
};

// A host whose clock was wrong once must not be quiet for ever.
TEST_F(StoreCommands, ListFindsNoFreshSnapshotInTheFuture) {
  constexpr int64_t hour = 3'600'000;
  const auto store = open();
  write(*store, texts(0, 3), {}, now_unix_ms() + 365 * 24 * hour);
  Status listed = run({"list", "--max-age", "26h"});
  ASSERT_FALSE(listed);
  EXPECT_EQ(listed.error().code(), ErrorCode::stale);
  EXPECT_NE(listed.error().message().find("future"), std::string::npos) << listed.error().message();
  write(*store, texts(0, 3), {}, now_unix_ms() - 48 * hour);
  listed = run({"list", "--max-age", "26h"});
  ASSERT_FALSE(listed);
  EXPECT_NE(listed.error().message().find("48.0 hours"), std::string::npos) << listed.error().message();
  write(*store, texts(0, 3), {}, now_unix_ms() - hour);
  EXPECT_TRUE(run({"list", "--max-age", "26h"}));
}

TEST_F(StoreCommands, RmAndUndeleteTakeOneThatIsNamedTwice) {
  const auto store = open();
  const std::string id = write(*store, texts(0, 3)).id;
  const std::string other = write(*store, texts(0, 3)).id;
  Status moved = run({"rm", id, other, id});
  EXPECT_TRUE(moved) << moved.error().message();
  EXPECT_EQ(files_in(store->paths().trash()), 2u);
  moved = run({"undelete", id, id});
  EXPECT_TRUE(moved) << moved.error().message();
  EXPECT_EQ(files_in(store->paths().trash()), 1u);
}

TEST_F(StoreCommands, KeyIsForStores) {
  std::filesystem::create_directory(options_.directory);
  const Status none = run({"key"});
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().code(), ErrorCode::usage);
  EXPECT_NE(none.error().message().find("is not a store"), std::string::npos);
  EXPECT_EQ(files_in(options_.directory), 0u);
}

// What may not be looked into is not taken for missing, nor made anew.
TEST_F(StoreCommands, AStoreOfSomebodyElse) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to be somebody else";
  std::filesystem::create_directory(options_.directory);
  std::filesystem::permissions(options_.directory, std::filesystem::perms::owner_all);
  ASSERT_EQ(::seteuid(65534), 0);
  const auto opened = Store::open(options_);
  const auto made = Store::open_or_create(options_);
  ASSERT_EQ(::seteuid(0), 0);
  for (const auto* result : {&opened, &made}) {
    ASSERT_FALSE(*result);
    EXPECT_EQ(result->error().code(), ErrorCode::privilege);
    EXPECT_NE(result->error().message().find("cannot look for"), std::string::npos);
  }
}

TEST_F(StoreCommands, KeyWaitsAsItIsAskedTo) {
  seal_store();
  const auto store = open();
  const std::vector<std::string> list = {"key", "--key-file", *options_.key.key_file};
  {
    const StoreLock lock = StoreLock::maintain(store->paths(), std::chrono::milliseconds(0)).value();
    EXPECT_EQ(run(list).error().code(), ErrorCode::locked);
  }
  std::vector<std::string> patient = list;
  patient.insert(patient.end(), {"--lock-wait", "1m"});
  EXPECT_TRUE(run(patient));
}

}  // namespace
}  // namespace vmsnap
