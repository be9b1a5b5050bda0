// The floor of reading guest memory: how fast threads can copy memory of another
// process and hash each page of it.
//
//   read_hash PID START-END THREADS    prints seconds
#include <sys/uio.h>
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

int main(int argc, char** argv) {
  constexpr size_t page_bytes = 4096, step = 32 * page_bytes;
  unsigned long start = 0, end = 0;
  if (argc != 4 || std::sscanf(argv[2], "%lx-%lx", &start, &end) != 2) {
    std::fprintf(stderr, "usage: read_hash PID START-END THREADS\n");
    return 2;
  }
  const int pid = std::atoi(argv[1]);
  std::atomic<unsigned long> next = start;
  std::atomic<bool> failed = false;
  std::vector<std::thread> threads;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < std::atoi(argv[3]); ++i) {
    threads.emplace_back([&] {
      std::vector<char> buffer(step);
      uint64_t sum = 0;
      for (;;) {
        const unsigned long at = next.fetch_add(step);
        if (at >= end) break;
        const size_t length = std::min<unsigned long>(step, end - at);
        const iovec to = {buffer.data(), length}, from = {reinterpret_cast<void*>(at), length};
        if (::process_vm_readv(pid, &to, 1, &from, 1, 0) != static_cast<ssize_t>(length)) failed = true;
        for (size_t page = 0; page < length; page += page_bytes) sum += XXH3_64bits(&buffer[page], page_bytes);
      }
      volatile uint64_t used = sum;
      (void)used;
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (failed) return 1;
  std::printf("%.4f\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
}
