// What the writes of a process go through while its memory is captured.
//
//   write_stall floor PAGES [LOAD]
//                              the bare mechanism: event, unprotect, wake; no
//                              copy, nothing else to do; prints JSON. With LOAD,
//                              in the conditions of a snapshot: the victim's
//                              writes, its pace, and a thread per processor that
//                              compresses, all scheduled as vmsnap's are; whoever
//                              answers stays on the processor of whoever writes
//   write_stall victim PAGES KIND LOAD
//                              memory of KIND (anonymous, thp, memfd), four
//                              fifths of it filled; prints "RANGE start-end",
//                              then rewrites whole pages in random order, LOAD
//                              MB/s (0: none, full: as fast as it can). For each
//                              line on standard input: prints JSON of the time
//                              since the last one. Ends with standard input.
//
// Both write from one thread, one page at a time, and take the time of each
// write from outside; those longer than `threshold_us` waited for somebody.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "snap/thread_priority.h"

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

// So many pages a second, in groups, where 0 is as fast as it goes; what was missed is
// made up for.
class Pace {
 public:
  explicit Pace(const std::string& megabytes_per_second)
      : rate_(megabytes_per_second == "full" ? 0 : std::strtod(megabytes_per_second.c_str(), nullptr) * 1e6 / page_bytes) {}

  void wait_before(size_t page) {
    if (rate_ == 0 || page % group != 0) return;
    due_ += group / rate_;
    const auto when = start_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(due_));
    if (when > Clock::now()) std::this_thread::sleep_until(when);
    if (Clock::now() - when > std::chrono::seconds(1)) start_ += std::chrono::seconds(1);
  }

 private:
  static constexpr int group = 32;

  double rate_;
  Clock::time_point start_ = Clock::now();
  double due_ = 0;
};

// The rest of a page whose first byte was written: the writer's own work.
void write_rest(char* page) {
  for (size_t i = 64; i < page_bytes; i += 64) {
    volatile char* touched = page + i;
    *touched = static_cast<char>(*touched + 1);
  }
}

void stay_on_first_processor() {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(0, &one);
  ::sched_setaffinity(0, sizeof one, &one);
}

[[noreturn]] void compress(char* memory, size_t pages) {
  const vmsnap::LowerPriority deferred;
  vmsnap::take_short_turns();
  std::vector<char> packed(ZSTD_compressBound(page_bytes));
  ZSTD_CCtx* context = ZSTD_createCCtx();
  for (size_t page = 0;; page = (page + 1) % pages) {
    ZSTD_compressCCtx(context, packed.data(), packed.size(), memory + page * page_bytes, page_bytes, 1);
  }
}

// One for each processor. In processes of their own: as ours, they have nothing to do
// with the memory that is written, whose mappings they would have to be told of.
class Compressors {
 public:
  Compressors() {
    for (unsigned i = 0; i < std::thread::hardware_concurrency(); ++i) {
      const pid_t child = ::fork();
      if (child == 0) {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        compress(make_memory(own_pages), own_pages);
      }
      children_.push_back(child);
    }
  }
  ~Compressors() {
    for (const pid_t child : children_) {
      ::kill(child, SIGKILL);
      ::waitpid(child, nullptr, 0);
    }
  }

 private:
  static constexpr size_t own_pages = 16384;

  std::vector<pid_t> children_;
};

double timed_write(char* place) {
  const auto start = Clock::now();
  volatile char* touched = place;
  *touched = static_cast<char>(*touched + 1);
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

void print(std::vector<double> times, const char* end = "\n") {
  std::sort(times.begin(), times.end());
  const auto at = [&](double share) {
    return times.empty() ? 0.0 : times[static_cast<size_t>(share * static_cast<double>(times.size() - 1))];
  };
  std::printf("{\"writes\": %zu, \"p50_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f}%s",
              times.size(), at(0.5), at(0.99), at(1.0), end);
  std::fflush(stdout);
}

int measure_floor(size_t pages, const char* load) {
  std::optional<Compressors> compressors;
  if (load) compressors.emplace();
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
    if (load) {
      vmsnap::prefer_this_thread();
      stay_on_first_processor();
    }
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
  if (load) stay_on_first_processor();
  std::vector<double> times;
  Pace pace(load ? load : "full");
  for (const size_t page : shuffled(pages)) {
    pace.wait_before(times.size());
    times.push_back(timed_write(memory + page * page_bytes));
    if (load) write_rest(memory + page * page_bytes);
  }
  stop = true;
  handler.join();
  print(std::move(times));
  return 0;
}

char* make_memory_of(const std::string& kind, size_t pages) {
  constexpr size_t huge = 2 << 20;
  const size_t bytes = pages * page_bytes;
  const int fd = kind == "memfd" ? ::memfd_create("victim", 0) : -1;
  if (fd >= 0 && ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) std::exit(1);
  void* reserved = ::mmap(nullptr, bytes + huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved == MAP_FAILED) std::exit(1);
  auto* start = reinterpret_cast<char*>((reinterpret_cast<uint64_t>(reserved) + huge - 1) / huge * huge);
  const int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  if (::mmap(start, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0) == MAP_FAILED) std::exit(1);
  ::madvise(start, bytes, kind == "thp" ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return start;
}

// Of every five filled pages one is a copy of others, four compress to about a
// half.
void fill(char* memory, size_t pages) {
  constexpr size_t kinds = 64;
  std::vector<uint64_t> patterns(kinds * page_bytes / 8);
  std::mt19937_64 random(1);
  for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = i % 3 ? i : random();
  for (size_t page = 0; page < pages; ++page) {
    char* to = memory + page * page_bytes;
    std::memcpy(to, patterns.data() + page % kinds * page_bytes / 8, page_bytes);
    if (page % 5) *reinterpret_cast<uint64_t*>(to + 2048) = page;
  }
}

class Writer {
 public:
  Writer(char* memory, size_t pages, const std::string& load)
      : memory_(memory), order_(shuffled(pages)), pace_(load) {}

  // Until stop().
  void run() {
    for (size_t i = 0; !stop_; i = (i + 1) % order_.size()) {
      pace_.wait_before(i);
      write(memory_ + order_[i] * page_bytes);
      if (mark_) report();
    }
  }
  void stop() { stop_ = true; }
  void mark() {
    mark_ = true;
    while (mark_ && !stop_) ::usleep(100);
  }

 private:
  void write(char* page) {
    // The first byte waits, as in the floor.
    const double took = timed_write(page);
    write_rest(page);
    ++written_;
    if (took > threshold_us) waited_.push_back(took);
  }

  void report() {
    const double seconds = std::chrono::duration<double>(Clock::now() - since_).count();
    std::printf("{\"pages_per_s\": %.0f, \"waits\": ", static_cast<double>(written_) / seconds);
    print(waited_, "}\n");
    waited_.clear();
    written_ = 0;
    since_ = Clock::now();
    mark_ = false;
  }

  char* memory_;
  std::vector<size_t> order_;
  Pace pace_;
  std::atomic<bool> stop_ = false, mark_ = false;
  std::vector<double> waited_;
  uint64_t written_ = 0;
  Clock::time_point since_ = Clock::now();
};

int be_victim(size_t pages, const std::string& kind, const std::string& load) {
  char* memory = make_memory_of(kind, pages);
  const size_t filled = pages * 4 / 5;
  fill(memory, filled);
  Writer writer(memory, filled, load);
  const bool idle = load == "0";
  std::thread thread([&] {
    if (!idle) writer.run();
  });
  std::printf("RANGE %lx-%lx\n", reinterpret_cast<unsigned long>(memory),
              reinterpret_cast<unsigned long>(memory + pages * page_bytes));
  std::fflush(stdout);
  char line[64];
  while (std::fgets(line, sizeof line, stdin)) {
    if (idle) {
      std::puts("{\"pages_per_s\": 0, \"waits\": null}");
    } else {
      writer.mark();
    }
    std::fflush(stdout);
  }
  writer.stop();
  thread.join();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const size_t pages = argc >= 3 ? std::strtoull(argv[2], nullptr, 10) : 0;
  if (pages > 0 && (argc == 3 || argc == 4) && std::strcmp(argv[1], "floor") == 0) {
    return measure_floor(pages, argc == 4 ? argv[3] : nullptr);
  }
  if (pages > 0 && argc == 5 && std::strcmp(argv[1], "victim") == 0) return be_victim(pages, argv[3], argv[4]);
  std::fprintf(stderr, "usage: write_stall floor PAGES [MB|full] | victim PAGES anonymous|thp|memfd 0|MB|full\n");
  return 2;
}
