// Files that are read at any place, plain and sealed.
#include "formats/sealed_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <functional>
#include <thread>

#include "formats/append_file.h"
#include "formats/checksum.h"
#include "tests/formats/crypto_test.h"
#include "tests/formats/test_image.h"

namespace vmsnap {
namespace {

constexpr size_t chunk = layout::sealed_chunk;
constexpr size_t stored_chunk = chunk + seal_tag_size;
constexpr size_t prelude_size = sizeof(layout::SealedPrelude);

std::vector<std::byte> first_of(const std::vector<std::byte>& bytes, size_t length) {
  return {bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(length)};
}

void write_sealed(const std::string& path, std::span<const std::byte> bytes, const SecretKey& key,
                  size_t piece = 1 << 20) {
  const Fd fd = open_file(path, O_RDWR | O_CREAT | O_TRUNC).value();
  SealedWriter writer(fd.get(), path, key);
  while (!bytes.empty()) {
    const auto some = bytes.first(std::min(piece, bytes.size()));
    ASSERT_TRUE(writer.append(some));
    bytes = bytes.subspan(some.size());
  }
  ASSERT_TRUE(writer.finish());
}

TEST(PlainSource, ReadsAtAnyPlace) {
  TempDirectory directory;
  const std::string path = directory.file("a");
  write_file(path, bytes_of("0123456789"));
  const auto source = PlainSource::open(path).value();
  EXPECT_EQ(source->size(), 10u);
  EXPECT_EQ(source->name(), path);
  std::array<std::byte, 3> out;
  ASSERT_TRUE(source->read_exact(7, out));
  EXPECT_EQ(hex(out), "373839");
  const Status beyond = source->read_exact(8, out);
  ASSERT_FALSE(beyond);
  EXPECT_EQ(beyond.error().code(), ErrorCode::damaged);
  EXPECT_EQ(beyond.error().message(), path + " ends at byte 10: it is cut short");
}

TEST(PlainSource, OnlyRegularFiles) {
  TempDirectory directory;
  EXPECT_EQ(PlainSource::open(directory.path()).error().message(),
            directory.path() + " is not a regular file");
  const std::string fifo = directory.file("fifo");
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);  // opening it does not wait for a writer
  EXPECT_EQ(PlainSource::open(fifo).error().code(), ErrorCode::damaged);
  EXPECT_EQ(SealedSource::open(fifo, test_key()).error().code(), ErrorCode::damaged);
}

class SealedFileTest : public testing::Test {
 protected:
  SealedFileTest() : path_(directory_.file("a.sealed")), bytes_(some_state(20 * chunk + 100)) {
    write_sealed(path_, bytes_, key_);
    original_ = read_file(path_);
  }

  // What opening, or else reading all of it, fails with.
  Error error_of(const std::vector<std::byte>& file) {
    write_file(path_, file);
    const auto source = SealedSource::open(path_, key_);
    if (!source) return source.error();
    std::vector<std::byte> out((*source)->size());
    const Status read = (*source)->read_exact(0, out);
    return read ? Error(ErrorCode::usage, "nothing is wrong") : read.error();
  }
  ErrorCode code_of(const std::vector<std::byte>& file) { return error_of(file).code(); }

  // With a prelude that was changed by somebody who knows XXH3.
  std::vector<std::byte> forged(const std::function<void(layout::SealedPrelude&)>& change) {
    std::vector<std::byte> file = original_;
    layout::SealedPrelude prelude;
    std::memcpy(&prelude, file.data(), sizeof prelude);
    change(prelude);
    prelude.checksum = checksum(std::as_bytes(std::span(&prelude, 1)).first(56), 0);
    std::memcpy(file.data(), &prelude, sizeof prelude);
    return file;
  }

  TempDirectory directory_;
  const std::string path_;
  const SecretKey key_ = test_key();
  const std::vector<std::byte> bytes_;
  std::vector<std::byte> original_;
};

TEST_F(SealedFileTest, EveryLengthComesBack) {
  for (const size_t length : {size_t{0}, size_t{1}, chunk - 1, chunk, chunk + 1, 8 * chunk,
                              9 * chunk + 5, bytes_.size()}) {
    for (const size_t piece : {size_t{777}, chunk, size_t{1} << 20}) {
      const std::vector<std::byte> bytes = first_of(bytes_, length);
      write_sealed(path_, bytes, key_, piece);
      const uint64_t chunks = std::max<uint64_t>(1, (length + chunk - 1) / chunk);
      EXPECT_EQ(std::filesystem::file_size(path_), prelude_size + length + chunks * seal_tag_size);
      const auto source = SealedSource::open(path_, key_).value();
      ASSERT_EQ(source->size(), length);
      std::vector<std::byte> out(length);
      ASSERT_TRUE(source->read_exact(0, out)) << length;
      EXPECT_EQ(out, bytes) << length;
    }
  }
}

TEST_F(SealedFileTest, ReadsAtAnyPlace) {
  const auto source = SealedSource::open(path_, key_).value();
  for (const size_t offset : {size_t{0}, size_t{1}, chunk - 1, chunk, 3 * chunk + 7, 20 * chunk}) {
    for (const size_t length : {size_t{0}, size_t{1}, size_t{99}, chunk, chunk + 1, 9 * chunk}) {
      if (offset + length > bytes_.size()) continue;
      std::vector<std::byte> out(length);
      ASSERT_TRUE(source->read_exact(offset, out));
      EXPECT_TRUE(std::equal(out.begin(), out.end(), bytes_.begin() + static_cast<long>(offset)))
          << offset << " " << length;
    }
  }
}

TEST_F(SealedFileTest, NothingBeyondTheEnd) {
  const auto source = SealedSource::open(path_, key_).value();
  std::array<std::byte, 2> out;
  for (const uint64_t offset : {bytes_.size() - 1, bytes_.size(), ~size_t{0}}) {
    const Status read = source->read_exact(offset, out);
    ASSERT_FALSE(read);
    EXPECT_EQ(read.error().code(), ErrorCode::damaged);
  }
  EXPECT_TRUE(source->read_exact(bytes_.size(), {}));
}

TEST_F(SealedFileTest, ManyThreads) {
  const auto source = SealedSource::open(path_, key_).value();
  std::vector<std::jthread> threads;
  std::atomic<int> wrong = 0;
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::vector<std::byte> out(3 * chunk);
      for (size_t i = 0; i < 50; ++i) {
        const size_t offset = (t * 1000 + i * 997) % (bytes_.size() - out.size());
        const bool read = source->read_exact(offset, out).has_value();
        if (!read ||
            !std::equal(out.begin(), out.end(), bytes_.begin() + static_cast<long>(offset)))
          ++wrong;
      }
    });
  }
  threads.clear();
  EXPECT_EQ(wrong, 0);
}

TEST_F(SealedFileTest, HidesAndNeverRepeatsItself) {
  const std::vector<std::byte> zeros(3 * chunk);
  write_sealed(path_, zeros, key_);
  const std::vector<std::byte> one = read_file(path_);
  write_sealed(path_, zeros, key_);
  const std::vector<std::byte> other = read_file(path_);
  const auto stored = [](const std::vector<std::byte>& file, size_t number) {
    const auto begin = file.begin() + static_cast<long>(prelude_size + number * stored_chunk);
    return std::vector<std::byte>(begin, begin + chunk);
  };
  EXPECT_NE(stored(one, 0), first_of(zeros, chunk));
  EXPECT_NE(stored(one, 0), stored(one, 1));
  EXPECT_NE(stored(one, 0), stored(other, 0));
}

TEST_F(SealedFileTest, EveryChangedByteIsFound) {
  for (size_t at = 0; at < original_.size(); at += at < prelude_size ? 1 : 101) {
    std::vector<std::byte> file = original_;
    file[at] ^= std::byte{0x10};
    ASSERT_EQ(code_of(file), ErrorCode::damaged) << at;
  }
  std::vector<std::byte> file = original_;
  file[prelude_size + 2 * stored_chunk] ^= std::byte{1};
  EXPECT_EQ(error_of(file).message(),
            path_ + " is damaged: what is sealed from byte 8192 on is not authentic");
}

TEST_F(SealedFileTest, EveryOtherLengthIsFound) {
  for (size_t length = 0; length < original_.size(); length += length < 200 ? 1 : 1009) {
    ASSERT_EQ(code_of(first_of(original_, length)), ErrorCode::damaged) << length;
  }
  std::vector<std::byte> longer = original_;
  longer.resize(longer.size() + 1);
  EXPECT_EQ(error_of(longer).message(),
            fmt::format("{} is damaged: it has {} bytes where {} bytes were sealed", path_,
                        longer.size(), bytes_.size()));
}

// By somebody who makes length and checksum right again.
TEST_F(SealedFileTest, CuttingWholeChunksIsFound) {
  for (const uint64_t chunks : {1, 5, 20}) {
    std::vector<std::byte> file =
        forged([&](layout::SealedPrelude& prelude) { prelude.length = chunks * chunk; });
    file.resize(prelude_size + chunks * stored_chunk);
    EXPECT_EQ(code_of(file), ErrorCode::damaged) << chunks;
  }
  std::vector<std::byte> empty =
      forged([&](layout::SealedPrelude& prelude) { prelude.length = 0; });
  empty.resize(prelude_size + seal_tag_size);
  EXPECT_EQ(code_of(empty), ErrorCode::damaged);
}

TEST_F(SealedFileTest, ReorderingAndMixingIsFound) {
  std::vector<std::byte> swapped = original_;
  const auto begin = swapped.begin() + prelude_size;
  std::swap_ranges(begin, begin + stored_chunk, begin + stored_chunk);
  EXPECT_EQ(code_of(swapped), ErrorCode::damaged);

  // The same bytes at the same place of another file of the same key.
  write_sealed(path_, bytes_, key_);
  const std::vector<std::byte> other = read_file(path_);
  std::vector<std::byte> mixed = original_;
  std::copy_n(other.begin() + prelude_size, stored_chunk, mixed.begin() + prelude_size);
  EXPECT_EQ(code_of(mixed), ErrorCode::damaged);
  std::vector<std::byte> foreign = original_;
  std::copy_n(other.begin(), prelude_size, foreign.begin());
  EXPECT_EQ(code_of(foreign), ErrorCode::damaged);
}

TEST_F(SealedFileTest, PreludesThatAreNotOurs) {
  EXPECT_EQ(code_of(forged([](auto&) {})), ErrorCode::usage);
  EXPECT_EQ(code_of(forged([](auto& p) { p.length = ~uint64_t{0}; })), ErrorCode::damaged);
  EXPECT_EQ(code_of(forged([](auto& p) { p.reserved0 = 1; })), ErrorCode::damaged);
  EXPECT_EQ(code_of(forged([](auto& p) { p.reserved[15] = 1; })), ErrorCode::damaged);
  EXPECT_EQ(error_of(std::vector<std::byte>(100)).message(),
            path_ + " is not a sealed file of vmsnap");
  const Error newer = error_of(forged([](auto& p) { p.version = 2; }));
  EXPECT_EQ(newer.code(), ErrorCode::unsupported);
  EXPECT_EQ(newer.remedy(), "Use a newer vmsnap.");
}

TEST_F(SealedFileTest, AnotherKeyIsFoundAtOnce) {
  const auto source = SealedSource::open(path_, test_key(1));
  ASSERT_FALSE(source);
  EXPECT_EQ(source.error().code(), ErrorCode::damaged);
  EXPECT_NE(source.error().remedy().find("another store"), std::string::npos);
}

TEST_F(SealedFileTest, UnfinishedIsNoSealedFile) {
  {
    const Fd fd = open_file(path_, O_RDWR | O_CREAT | O_TRUNC).value();
    SealedWriter writer(fd.get(), path_, key_);
    for (int i = 0; i < 20; ++i) ASSERT_TRUE(writer.append(bytes_));
  }
  EXPECT_GT(std::filesystem::file_size(path_), 0u);
  EXPECT_EQ(SealedSource::open(path_, key_).error().message(),
            path_ + " is not a sealed file of vmsnap");
}

// What writes to a ByteSink sees the same offsets in both.
TEST_F(SealedFileTest, SinksAgree) {
  const std::string plain_path = directory_.file("plain");
  const Fd plain_fd = open_file(plain_path, O_RDWR | O_CREAT).value();
  const Fd sealed_fd = open_file(path_, O_RDWR | O_TRUNC).value();
  AppendFile plain(plain_fd.get(), plain_path, 0);
  SealedWriter sealed(sealed_fd.get(), path_, key_);
  for (ByteSink* sink : {static_cast<ByteSink*>(&plain), static_cast<ByteSink*>(&sealed)}) {
    ASSERT_TRUE(sink->append(bytes_of("abc")));
    ASSERT_TRUE(sink->pad_to(8192));
    EXPECT_EQ(sink->offset(), 8192u);
    // More than the writers hold back.
    for (int i = 0; i < 30; ++i) ASSERT_TRUE(sink->append(bytes_));
    EXPECT_EQ(sink->offset(), 8192 + 30 * bytes_.size());
    ASSERT_TRUE(sink->finish());
  }
  const auto source = SealedSource::open(path_, key_).value();
  std::vector<std::byte> out(source->size());
  ASSERT_TRUE(source->read_exact(0, out));
  EXPECT_EQ(out, read_file(plain_path));
}

TEST_F(SealedFileTest, WriteErrorsAreReported) {
  const Fd full = open_file("/dev/full", O_WRONLY).value();
  SealedWriter writer(full.get(), "/dev/full", key_);
  ASSERT_TRUE(writer.append(bytes_));
  const Status finished = writer.finish();
  ASSERT_FALSE(finished);
  EXPECT_EQ(finished.error().code(), ErrorCode::no_space);
}

}  // namespace
}  // namespace vmsnap
