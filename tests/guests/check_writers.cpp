// check_writers FILE --mib N --threads T [--seed S] [--offset BYTES] [--settled]
//
// Says whether FILE (a raw export, from --offset on) is one instant of the
// memory of writers.cpp. Exit status 0: yes, with "OK writes" and what each
// actor had published. 1: no, with the reason. 2: it could not be read.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

#include "writers_oracle.h"

int main(int argc, char** argv) {
  writers::Layout layout;
  layout.threads = 2;
  layout.seed = 1;
  uint64_t offset = 0;
  bool settled = false;
  const char* path = nullptr;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto number = [&] { return i + 1 < argc ? std::strtoull(argv[++i], nullptr, 0) : 0; };
    if (argument == "--mib")
      layout.bytes = number() << 20;
    else if (argument == "--threads")
      layout.threads = static_cast<unsigned>(number());
    else if (argument == "--seed")
      layout.seed = number();
    else if (argument == "--offset")
      offset = number();
    else if (argument == "--settled")
      settled = true;
    else
      path = argv[i];
  }
  if (!path || layout.bytes < writers::smallest_bytes || layout.threads > writers::max_writers) {
    std::fprintf(stderr, "usage: check_writers FILE --mib N --threads T [--seed S] [--offset B]\n");
    return 2;
  }
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (fd < 0 || fstat(fd, &status) != 0) {
    std::perror(path);
    return 2;
  }
  if (static_cast<uint64_t>(status.st_size) < offset + layout.bytes) {
    std::printf("BAD the file has %lld bytes, too few\n", static_cast<long long>(status.st_size));
    return 1;
  }
  void* map = mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (map == MAP_FAILED) {
    std::perror("mmap");
    return 2;
  }
  writers::Oracle oracle(layout, static_cast<const uint8_t*>(map) + offset, settled);
  const auto verdict = oracle.check();
  if (!verdict.error.empty()) {
    std::printf("BAD %s\n", verdict.error.c_str());
    return 1;
  }
  std::printf("OK %lu", verdict.writes);
  for (uint64_t published : verdict.published) std::printf(" %lu", published);
  std::printf("\n");
  return 0;
}
