// Descriptors, whole reads and writes, and files that appear whole or not at all.
//
// Everything here may block on the disk. Nothing is shared between threads
// unless a comment says so; pread and pwrite on one descriptor are safe from
// several threads (POSIX).
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "formats/error.h"

namespace vmsnap {

// Owns one file descriptor; closes it when destroyed. -1 means none.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept;
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release();
  void reset();

 private:
  int fd_ = -1;
};

// open(2) with O_CLOEXEC; `path` is named in the error.
Result<Fd> open_file(const std::string& path, int flags, mode_t mode = 0600);

// Exactly bytes.size() bytes at `offset`. A short file is ErrorCode::damaged,
// because whoever asks has been told a length that the file does not keep.
Status read_exact_at(int fd, std::span<std::byte> bytes, uint64_t offset, const std::string& name);

// All of `bytes` at `offset`, whatever short writes the system makes.
Status write_all_at(int fd, std::span<const std::byte> bytes, uint64_t offset,
                    const std::string& name);

// All of `bytes` at the current position (pipes, sockets, appending).
Status write_all(int fd, std::span<const std::byte> bytes, const std::string& name);

// Whether reads and writes wait: of all descriptors that were duplicated from this one.
Status set_nonblocking(int fd, bool on, const std::string& name);

// Takes the kernel lock (of the open file description, fcntl(2)) on all of a
// file, without waiting; it goes with the last copy of the descriptor. False:
// somebody has it.
enum class FileLock { exclusive, shared };
Result<bool> lock_whole_file(int fd, const std::string& name, FileLock kind = FileLock::exclusive);
void unlock_whole_file(int fd);

// A whole small file (a /proc entry, a configuration file); more than `limit`
// bytes is an error.
Result<std::string> read_small_file(const std::string& path, size_t limit = 16 << 20);

// The same for what a command of this user wrote down, and acts upon: not if it is
// another's (root's will do) or others may write to it, ErrorCode::refused.
Result<std::string> read_own_file(const std::string& path, size_t limit);

// Replaces `path` by `contents`: a temporary file beside it, fsync, rename.
Status write_small_file(const std::string& path, std::string_view contents, mode_t mode = 0600);

// fsync of the directory that holds `path`: makes a rename there durable.
Status sync_directory_of(const std::string& path);

// Removes the hidden files in `directory` whose writers were killed.
void remove_abandoned(const std::string& directory);

// Gives a file another name in the same file system, and never another file's: EEXIST.
// Syncs nothing.
Status rename_to_new(const std::string& from, const std::string& to);

// An output file that exists whole under its final name or not at all.
//
// The bytes go to a hidden file in the same directory, held by a kernel lock
// (open file description, fcntl(2)) for as long as its writer lives. commit()
// is fsync, rename, fsync of the directory. Destruction without commit removes
// it. A killed writer leaves it behind unlocked, and the next create() for the
// same path removes it.
class AtomicFile {
 public:
  // ErrorCode::exists if `path` is there and `replace` is false, now and again
  // at commit (no other writer's file is ever overwritten).
  static Result<AtomicFile> create(const std::string& path, bool replace);
  // The same with the hidden file in another directory of the same file
  // system, from which remove_abandoned() clears what killed writers left.
  static Result<AtomicFile> create_in(const std::string& directory, const std::string& path,
                                      bool replace);

  AtomicFile(AtomicFile&&) = default;
  AtomicFile& operator=(AtomicFile&& other) noexcept;
  ~AtomicFile() { discard(); }

  int fd() const { return fd_.get(); }
  const std::string& path() const { return path_; }

  Status commit();
  void discard();

  // Another final name, in the same directory or another of the file system.
  void rename_to(const std::string& path) { path_ = path; }

  // The three parts of commit(), for files that are committed together: fsync;
  // rename; and sync_directory_of(path()) by the caller.
  Status sync();
  Status publish();

 private:
  AtomicFile() = default;

  Fd fd_;
  std::string path_;
  std::string temporary_path_;  // empty once committed or discarded
  bool replace_ = false;
};

}  // namespace vmsnap
