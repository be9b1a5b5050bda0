#include "formats/key_source.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <vector>

#include "formats/file.h"
#include "formats/log.h"

namespace vmsnap {

namespace {

constexpr const char* one_key_only =
    "Give only one of --key-file, --passphrase-file, --passphrase-command and --passphrase-fd; "
    "without any, only one of VMSNAP_KEY_FILE, VMSNAP_PASSPHRASE, VMSNAP_PASSPHRASE_FILE and "
    "VMSNAP_PASSPHRASE_COMMAND.";

tl::unexpected<Error> bad_key(const std::string& what, const std::string& remedy) {
  return tl::unexpected(Error(ErrorCode::usage, what).with_remedy(remedy));
}

tl::unexpected<Error> empty_passphrase(const std::string& where) {
  return bad_key(where + " gives an empty passphrase", "Give one of at least one character.");
}

// Nothing else than read(2): a buffer of the C++ library would keep a copy.
Result<size_t> read_some(int fd, std::span<std::byte> out, const std::string& name) {
  for (;;) {
    const ssize_t got = ::read(fd, out.data(), out.size());
    if (got >= 0) return static_cast<size_t>(got);
    if (errno != EINTR) return fail_errno(errno, "cannot read {}", name);
  }
}

// Byte by byte, because what is behind the line may be meant for somebody else.
Result<SecretBytes> read_first_line(int fd, const std::string& name) {
  SecretBytes line = VMSNAP_TRY(SecretBytes::create(max_passphrase + 1));
  size_t length = 0;
  for (; length < line.size(); ++length) {
    const size_t got = VMSNAP_TRY(read_some(fd, line.bytes().subspan(length, 1), name));
    if (got == 0 || line.bytes()[length] == std::byte{'\n'}) break;
  }
  if (length > max_passphrase) {
    return bad_key(
        fmt::format("the first line of {} is longer than {} bytes", name, max_passphrase),
        "Use --key-file for a key that is not a line of text.");
  }
  line.shrink(length);
  return line;
}

Result<KeyMaterial> passphrase_of(Result<SecretBytes> line, const std::string& where) {
  SecretBytes secret = VMSNAP_TRY(std::move(line));
  if (secret.size() == 0) return empty_passphrase(where);
  return KeyMaterial{KeyKind::passphrase, std::move(secret)};
}

void warn_if_others_can_read(int fd, const std::string& path) {
  struct stat status;
  if (::fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && (status.st_mode & 077) != 0) {
    log_warning(
        "{} holds a secret, but others than its owner have access to it (mode {:03o}): "
        "chmod 600 it",
        path, status.st_mode & 0777);
  }
}

Result<KeyMaterial> from_key_file(const std::string& path) {
  const Fd fd = VMSNAP_TRY(open_file(path, O_RDONLY));
  warn_if_others_can_read(fd.get(), path);
  SecretBytes content = VMSNAP_TRY(SecretBytes::create(max_key_file + 1));
  size_t length = 0;
  while (length < content.size()) {
    const size_t got = VMSNAP_TRY(read_some(fd.get(), content.bytes().subspan(length), path));
    if (got == 0) break;
    length += got;
  }
  if (length == 0 || length > max_key_file) {
    return bad_key(
        fmt::format("the key file {} {}", path, length == 0 ? "is empty" : "is larger than 1 MiB"),
        "Give a file of 32 random bytes, for instance.");
  }
  content.shrink(length);
  return KeyMaterial{KeyKind::key_file, std::move(content)};
}

Result<KeyMaterial> from_passphrase_file(const std::string& path) {
  const Fd fd = VMSNAP_TRY(open_file(path, O_RDONLY));
  warn_if_others_can_read(fd.get(), path);
  return passphrase_of(read_first_line(fd.get(), path), path);
}

Result<KeyMaterial> from_descriptor(int fd) {
  const std::string name = fmt::format("file descriptor {}", fd);
  // No program that is started later may find the passphrase in it.
  if (fd > STDERR_FILENO) ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  return passphrase_of(read_first_line(fd, name), name);
}

// Standard input and error stay ours: the command may ask its user something.
// 0, or an errno.
int start_command(const std::string& command, int output, pid_t& pid) {
  posix_spawn_file_actions_t files;
  ::posix_spawn_file_actions_init(&files);
  ::posix_spawn_file_actions_adddup2(&files, output, STDOUT_FILENO);
  posix_spawnattr_t attributes;
  ::posix_spawnattr_init(&attributes);
  // The ordinary way with signals that this program ignores.
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF);
  sigset_t defaults;
  ::sigemptyset(&defaults);
  for (const int number : {SIGPIPE, SIGXFSZ}) ::sigaddset(&defaults, number);
  ::posix_spawnattr_setsigdefault(&attributes, &defaults);
  char shell[] = "/bin/sh", dash_c[] = "-c";
  char* const arguments[] = {shell, dash_c, const_cast<char*>(command.c_str()), nullptr};
  const int error = ::posix_spawn(&pid, shell, &files, &attributes, arguments, environ);
  ::posix_spawnattr_destroy(&attributes);
  ::posix_spawn_file_actions_destroy(&files);
  return error;
}

// Reads to the end, or the command would die of a closed pipe.
Status drain(int fd, const std::string& name) {
  SecretBytes rest = VMSNAP_TRY(SecretBytes::create(4096));
  while (VMSNAP_TRY(read_some(fd, rest.bytes(), name)) != 0) {
  }
  return {};
}

Result<KeyMaterial> from_command(const std::string& command) {
  const std::string name = fmt::format("the passphrase command '{}'", command);
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) < 0) return fail_errno(errno, "cannot make a pipe");
  Fd output(ends[0]), input(ends[1]);
  pid_t pid = 0;
  const int error = start_command(command, input.get(), pid);
  if (error != 0) return fail_errno(error, "cannot start {}", name);
  input.reset();
  auto line = read_first_line(output.get(), name);
  const Status drained = line ? drain(output.get(), name) : Status();
  output.reset();
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (line && !WIFEXITED(status)) {
    return fail(ErrorCode::io, "{} was ended by signal {}", name, WTERMSIG(status));
  }
  if (line && WEXITSTATUS(status) != 0) {
    return fail(ErrorCode::io, "{} exited with status {}", name, WEXITSTATUS(status));
  }
  VMSNAP_CHECK(drained);
  return passphrase_of(std::move(line), name);
}

// Of the environment. One that is there but empty is an error: it is more often
// a mistake than the wish to have no key.
Result<std::optional<std::string>> variable(const char* name) {
  const char* const value = ::getenv(name);
  if (!value) return std::optional<std::string>();
  if (*value == 0) return bad_key(fmt::format("{} is set, but empty", name), "Set or unset it.");
  return std::optional<std::string>(value);
}

size_t count_given(const KeySource& source) {
  return size_t{source.key_file.has_value()} + source.passphrase_file.has_value() +
         source.passphrase_command.has_value() + source.passphrase_fd.has_value();
}

Result<KeyMaterial> read_source(const KeySource& source) {
  if (source.key_file) return from_key_file(*source.key_file);
  if (source.passphrase_file) return from_passphrase_file(*source.passphrase_file);
  if (source.passphrase_command) return from_command(*source.passphrase_command);
  return from_descriptor(*source.passphrase_fd);
}

Result<KeyMaterial> from_text(std::string_view text, const std::string& where) {
  if (text.size() > max_passphrase) {
    return bad_key(fmt::format("{} is longer than {} bytes", where, max_passphrase),
                   "Use a key file.");
  }
  SecretBytes secret = VMSNAP_TRY(SecretBytes::create(text.size()));
  std::memcpy(secret.bytes().data(), text.data(), text.size());
  return KeyMaterial{KeyKind::passphrase, std::move(secret)};
}

}  // namespace

bool names_a_key(const KeySource& source) { return count_given(source) > 0; }

void add_key_options(CLI::App& command, KeySource& source) {
  constexpr const char* group = "Encryption";
  command
      .add_option("--key-file", source.key_file, "The key is the content of this file, up to 1 MiB")
      ->group(group);
  command
      .add_option("--passphrase-file", source.passphrase_file,
                  "The passphrase is the first line of this file")
      ->group(group);
  command
      .add_option("--passphrase-command", source.passphrase_command,
                  "The passphrase is the first line that this shell command prints")
      ->group(group);
  command
      .add_option("--passphrase-fd", source.passphrase_fd,
                  "The passphrase is the first line that can be read from this descriptor")
      ->check(CLI::NonNegativeNumber)
      ->group(group);
}

Result<std::optional<KeyMaterial>> read_key(const KeySource& source) {
  if (count_given(source) > 1) return bad_key("more than one key is given", one_key_only);
  if (count_given(source) == 1) return VMSNAP_TRY(read_source(source));
  KeySource environment;
  environment.key_file = VMSNAP_TRY(variable("VMSNAP_KEY_FILE"));
  environment.passphrase_file = VMSNAP_TRY(variable("VMSNAP_PASSPHRASE_FILE"));
  environment.passphrase_command = VMSNAP_TRY(variable("VMSNAP_PASSPHRASE_COMMAND"));
  const auto passphrase = VMSNAP_TRY(variable("VMSNAP_PASSPHRASE"));
  const size_t given = count_given(environment) + (passphrase ? 1 : 0);
  if (given > 1) return bad_key("more than one key is in the environment", one_key_only);
  if (passphrase) return VMSNAP_TRY(from_text(*passphrase, "VMSNAP_PASSPHRASE"));
  if (given == 1) return VMSNAP_TRY(read_source(environment));
  return std::optional<KeyMaterial>();
}

std::vector<char*> environment_without_keys() {
  std::vector<char*> kept;
  for (char** entry = environ; *entry; ++entry) {
    const std::string_view text(*entry);
    if (text.starts_with("VMSNAP_PASSPHRASE") || text.starts_with("VMSNAP_KEY_FILE=")) continue;
    kept.push_back(*entry);
  }
  return kept;
}

}  // namespace vmsnap
