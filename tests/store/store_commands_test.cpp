// list and rm, as main would run them.
#include "formats/store/store_commands.h"

#include <sstream>

#include "formats/clock.h"
#include "formats/command.h"
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

}  // namespace
}  // namespace vmsnap
