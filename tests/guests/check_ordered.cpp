// check_ordered FILE --address ADDRESS --pages N [--offset BYTES]
//
// Says whether FILE (a raw export, from --offset on) is one instant of an
// ordered guest's memory. Exit status 0: yes, with a line "OK edges counter".
// 1: no, with the reason. 2: it could not be read.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

#include "ordered_layout.h"

int main(int argc, char** argv) {
  uint64_t address = 0, pages = 0, offset = 0;
  const char* path = nullptr;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool has_value = argument.rfind("--", 0) == 0 && i + 1 < argc;
    if (argument == "--address" && has_value)
      address = std::strtoull(argv[++i], nullptr, 0);
    else if (argument == "--pages" && has_value)
      pages = std::strtoull(argv[++i], nullptr, 0);
    else if (argument == "--offset" && has_value)
      offset = std::strtoull(argv[++i], nullptr, 0);
    else
      path = argv[i];
  }
  if (!path || pages == 0) {
    std::fprintf(stderr, "usage: check_ordered FILE --address A --pages N [--offset BYTES]\n");
    return 2;
  }
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (fd < 0 || fstat(fd, &status) != 0) {
    std::perror(path);
    return 2;
  }
  if (static_cast<uint64_t>(status.st_size) < offset + pages * ordered::page_bytes) {
    std::printf("BAD the file has %lld bytes, too few\n", static_cast<long long>(status.st_size));
    return 1;
  }
  void* map = mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (map == MAP_FAILED) {
    std::perror("mmap");
    return 2;
  }
  const auto verdict = ordered::check(static_cast<const uint8_t*>(map) + offset,
                                      static_cast<uint32_t>(pages), static_cast<uint32_t>(address));
  if (!verdict.error.empty()) {
    std::printf("BAD %s\n", verdict.error.c_str());
    return 1;
  }
  std::printf("OK %u %u\n", verdict.edges, verdict.counter);
  return 0;
}
