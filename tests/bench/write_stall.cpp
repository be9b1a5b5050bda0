// How long a write waits for its page to be captured, seen by the writer.
//
//   write_stall floor PAGES    the bare mechanism: event, unprotect, wake; no
//                              copy, nothing else to do; prints JSON
//   write_stall victim PAGES   prints "RANGE start-end", then writes one byte a
//                              page in random order, again and again, until
//                              standard input ends; prints JSON for the writes
//                              that took longer than `threshold_us`
//
// Both write from one thread, one page at a time, and take the time of each
// write from outside.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t page_bytes = 4096;
// An ordinary write, a minor fault included, is quicker; a captured one never.
constexpr double threshold_us = 3.0;

char* make_memory(size_t pages) {
  void* memory = ::mmap(nullptr, pages * page_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::exit(1);
  ::madvise(memory, pages * page_bytes, MADV_NOHUGEPAGE);
  std::mt19937_64 random(1);
  auto* words = static_cast<uint64_t*>(memory);
  for (size_t i = 0; i < pages * page_bytes / 8; ++i) words[i] = i % 3 ? i : random();
  return static_cast<char*>(memory);
}

std::vector<size_t> shuffled(size_t pages) {
  std::vector<size_t> order(pages);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(2));
  return order;
}

double timed_write(char* place) {
  const auto start = Clock::now();
  volatile char* touched = place;
  *touched = static_cast<char>(*touched + 1);
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

void print(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const auto at = [&](double share) {
    return times.empty() ? 0.0 : times[static_cast<size_t>(share * static_cast<double>(times.size() - 1))];
  };
  std::printf("{\"writes\": %zu, \"p50_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f}\n",
              times.size(), at(0.5), at(0.99), at(1.0));
}

int measure_floor(size_t pages) {
  char* memory = make_memory(pages);
  const auto address = reinterpret_cast<uint64_t>(memory);
  const int fd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP, .ioctls = 0};
  uffdio_register range = {.range = {address, pages * page_bytes},
                           .mode = UFFDIO_REGISTER_MODE_WP,
                           .ioctls = 0};
  uffdio_writeprotect arm = {.range = range.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
  if (::ioctl(fd, UFFDIO_API, &api) || ::ioctl(fd, UFFDIO_REGISTER, &range) ||
      ::ioctl(fd, UFFDIO_WRITEPROTECT, &arm)) {
    std::perror("userfaultfd");
    return 1;
  }
  std::atomic<bool> stop = false;
  std::thread handler([&] {
    pollfd waiting = {fd, POLLIN, 0};
    while (!stop) {
      if (::poll(&waiting, 1, 50) <= 0) continue;
      uffd_msg message;
      if (::read(fd, &message, sizeof message) != sizeof message) continue;
      uffdio_writeprotect one = {
          .range = {message.arg.pagefault.address & ~uint64_t{page_bytes - 1}, page_bytes}, .mode = 0};
      ::ioctl(fd, UFFDIO_WRITEPROTECT, &one);
    }
  });
  std::vector<double> times;
  for (const size_t page : shuffled(pages)) times.push_back(timed_write(memory + page * page_bytes));
  stop = true;
  handler.join();
  print(std::move(times));
  return 0;
}

int be_victim(size_t pages) {
  char* memory = make_memory(pages);
  const std::vector<size_t> order = shuffled(pages);
  std::printf("RANGE %lx-%lx\n", reinterpret_cast<unsigned long>(memory),
              reinterpret_cast<unsigned long>(memory + pages * page_bytes));
  std::fflush(stdout);
  std::vector<double> times;
  times.reserve(pages * 2);
  pollfd input = {STDIN_FILENO, POLLIN, 0};
  while (::poll(&input, 1, 0) == 0) {
    for (size_t i = 0; i < order.size(); ++i) {
      const double took = timed_write(memory + order[i] * page_bytes);
      if (took > threshold_us) times.push_back(took);
      if (i % 64 == 0) ::usleep(200);  // a writer of some 100,000 pages a second at most
    }
  }
  print(std::move(times));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const size_t pages = argc == 3 ? std::strtoull(argv[2], nullptr, 10) : 0;
  if (pages > 0 && std::strcmp(argv[1], "floor") == 0) return measure_floor(pages);
  if (pages > 0 && std::strcmp(argv[1], "victim") == 0) return be_victim(pages);
  std::fprintf(stderr, "usage: write_stall floor|victim PAGES\n");
  return 2;
}
