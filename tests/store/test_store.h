// Stores for tests: snapshots of some pages, written and read back.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "formats/store/manifest.h"
#include "formats/store/store.h"
#include "formats/store/store_writer.h"
#include "tests/formats/test_image.h"

namespace vmsnap {

class StoreTest : public testing::Test {
 protected:
  TempDirectory directory_;
  StoreOptions options_ = {.directory = directory_.file("store"), .key = {}};

  std::unique_ptr<Store> open() { return Store::open_or_create(options_).value(); }

  // Makes the store of this test a sealed one.
  void seal_store(const std::string& secret = "a secret") {
    const std::string path = directory_.file("key");
    write_file(path, std::as_bytes(std::span(secret)));
    options_.key.key_file = path;
  }

  struct Written {
    std::string id;
    PageCounts counts;
    uint64_t added_bytes = 0;
  };

  // One region of these pages, of the VM "vm" unless `options` says otherwise.
  Written write(const Store& store, const std::vector<PageBytes>& pages,
                StoreWriter::Options options = {}, int64_t created_unix_ms = 1'732'140'700'123,
                std::span<const uint64_t> working_set = {}) {
    if (options.vm.empty()) options.vm = "vm";
    ImageInfo info = info_of({pages.size()});
    info.created_unix_ms = created_unix_ms;
    info.source["name"] = options.vm;
    if (!options.backup_name.empty()) info.tags = {backup_tag(options.backup_name)};
    auto writer = StoreWriter::begin(store, info.regions, options).value();
    ImageWriter::Encoder encoder;
    std::vector<uint64_t> numbers(pages.size());
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = i;
    const PageCounts counts = writer->image().write_pages(encoder, numbers, join(pages)).value();
    const std::string id = writer->image().id();
    const auto state = some_state(1000);
    const auto committed = writer->commit(info, state, working_set);
    EXPECT_TRUE(committed) << committed.error().message();
    return {id, counts, committed ? committed->added_bytes : 0};
  }

  void expect_pages(const Store& store, const std::string& id, const std::vector<PageBytes>& pages) {
    const auto reader = store.open_snapshot(id);
    ASSERT_TRUE(reader) << reader.error().message();
    ASSERT_EQ((*reader)->page_count(), pages.size());
    for (size_t i = 0; i < pages.size(); ++i) {
      PageBytes page;
      const auto kind = (*reader)->read_page(i, page);
      ASSERT_TRUE(kind) << kind.error().message();
      ASSERT_EQ(page, pages[i]) << "page " << i;
    }
    EXPECT_EQ((*reader)->device_state().value(), some_state(1000));
  }

  size_t files_in(const std::string& path) const {
    size_t count = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(path)) ++count;
    return count;
  }

  // Pages that compress, all different, from a first number on.
  static std::vector<PageBytes> texts(uint64_t first, size_t count) {
    std::vector<PageBytes> pages;
    for (size_t i = 0; i < count; ++i) pages.push_back(text_page(first + i));
    return pages;
  }
};

}  // namespace vmsnap
