// A process whose threads write to memory and watch each other, for ever; see
// writers_layout.h for what they write and writers_oracle.h for what any image
// of it must look like.
//
// writers [--memory anon|thp|memfd|memfd-private|hugetlb|hugetlb-private]
//         [--mib N] [--threads T] [--seed S] [--split 1]
//         [--disturb pageout,collapse,ksm,fork] [--sweep-us N] [--touch-us N]
//         [--sweep-by store|copied|direct] [--file PATH]
//
// With --sweep-by the kernel writes the sweeper's pages: by reading them from
// the file PATH, through the page cache or past it (O_DIRECT).
//
// Prints "RANGE start-end" (hex; with --split one line an area) and "READY",
// then runs until it is killed or its stdin ends. Commands on stdin:
//   check                 all actors stand still, the memory is checked, they go
//                         on. "OK writes" or "BAD reason"
//   progress              "PROGRESS writes", without stopping anything
//   dontneed OFFSET LEN   madvise(MADV_DONTNEED) within the fixed area
//   remove OFFSET LEN     madvise(MADV_REMOVE), a hole punched in a memfd
//   punch OFFSET LEN      the same by fallocate on the descriptor
//                         These three answer "DISCARDED errno".
//   unmap|move|readonly|none OFFSET LEN   munmap, mremap to elsewhere, mprotect;
//                         of the fixed area, with the same answer. Not to be
//                         checked after one of the first two.
//   fixed                 "FIXED offset length" of the fixed area
// Exit status 77 and a reason, if there is no such memory here.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <thread>

#include "writers_oracle.h"

#ifndef MADV_COLLAPSE  // 6.1
#define MADV_COLLAPSE 25
#endif

namespace {

using writers::Layout;
using writers::page_bytes;

[[noreturn]] void skip(const std::string& reason) {
  std::printf("SKIP %s: %s\n", reason.c_str(), std::strerror(errno));
  std::fflush(stdout);
  _exit(77);
}

struct Memory {
  uint8_t* start = nullptr;
  int fd = -1;              // of a memfd
  bool comes_back = false;  // what is discarded is read from the file again
};

void fill_constants(const Layout& layout, uint8_t* memory) {
  for (uint64_t i = 0; i < layout.writer_pages(); ++i) {
    reinterpret_cast<writers::WriterPage*>(memory + i * page_bytes)->index = i;
  }
  for (uint64_t i = 0; i < layout.small_pages(); ++i) {
    auto* page =
        reinterpret_cast<writers::UniformPage*>(memory + layout.uniform_at() + i * page_bytes);
    for (unsigned word = 0; word < std::size(page->pattern); ++word) {
      page->pattern[word] = writers::uniform_word(word);
    }
    writers::fill_fixed_page(
        reinterpret_cast<uint64_t*>(memory + layout.fixed_at() + i * page_bytes), i, layout.seed);
  }
}

Memory make_memory(const Layout& layout, const std::string& kind) {
  const bool huge = kind.rfind("hugetlb", 0) == 0;
  const bool file = kind.rfind("memfd", 0) == 0 || kind == "hugetlb";
  Memory memory;
  // A place that is aligned to 2 MiB; what is mapped there comes afterwards.
  void* reserved = mmap(nullptr, layout.bytes + writers::huge_bytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) skip("cannot reserve addresses");
  const uint64_t aligned =
      (reinterpret_cast<uint64_t>(reserved) + writers::huge_bytes - 1) & -writers::huge_bytes;
  const auto map_at = [&](int flags, int fd) {
    void* map = mmap(reinterpret_cast<void*>(aligned), layout.bytes, PROT_READ | PROT_WRITE,
                     flags | MAP_FIXED, fd, 0);
    if (map == MAP_FAILED) skip("cannot map " + kind + " memory");
    return static_cast<uint8_t*>(map);
  };
  if (file) {
    memory.fd = memfd_create("writers", MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));
    if (memory.fd < 0 || ftruncate(memory.fd, static_cast<off_t>(layout.bytes)) != 0) {
      skip("cannot make a memfd");
    }
    memory.start = map_at(MAP_SHARED, memory.fd);
  } else if (huge) {
    memory.start = map_at(MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1);
  } else {
    memory.start = map_at(MAP_PRIVATE | MAP_ANONYMOUS, -1);
    if (kind == "thp") madvise(memory.start, layout.bytes, MADV_HUGEPAGE);
  }
  fill_constants(layout, memory.start);
  // Private on top of the file that was just filled: half file, half own copies.
  if (kind == "memfd-private") {
    memory.start = map_at(MAP_PRIVATE, memory.fd);
    memory.comes_back = true;
  }
  return memory;
}

class Process {
 public:
  Process(const Layout& layout, Memory memory) : layout_(layout), memory_(memory) {
    for (unsigned actor = 0; actor < writers::actors; ++actor) {
      auto* home =
          reinterpret_cast<writers::WriterPage*>(memory_.start + layout_.home(actor) * page_bytes);
      counters_[actor] = reinterpret_cast<writers::Counter*>(&home->counter);
    }
  }

  // What the sweeper's pages are read from; else it stores them itself.
  void sweep_by(const std::string& how, const std::string& path) {
    if (how == "store") return;
    sweep_file_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | (how == "direct" ? O_DIRECT : 0), 0600);
    if (sweep_file_ < 0) skip("cannot open " + path);
    void* page = nullptr;
    if (posix_memalign(&page, page_bytes, page_bytes) != 0) std::abort();
    next_page_ = static_cast<writers::UniformPage*>(page);
    for (unsigned word = 0; word < std::size(next_page_->pattern); ++word) {
      next_page_->pattern[word] = writers::uniform_word(word);
    }
  }

  // Returns when each writer has written.
  void start(uint64_t sweep_us, uint64_t touch_us) {
    for (unsigned writer = 0; writer < layout_.threads; ++writer) {
      begin([this, writer] { write_slots(writer); });
    }
    begin([this, sweep_us] { sweep(sweep_us); });
    begin([this, touch_us] { touch(touch_us); });
    for (unsigned writer = 0; writer < layout_.threads; ++writer) {
      while (counters_[writer]->load(std::memory_order_acquire) == 0) std::this_thread::yield();
    }
  }

  // Starts a thread that disturbs with `what`, on random 2 MiB of all but the holes.
  void disturb(const std::string& what) {
    const uint64_t chunks = layout_.holes_at() / writers::huge_bytes;
    std::thread([this, what, chunks] {
      std::mt19937_64 random(layout_.seed);
      const auto pause = std::chrono::milliseconds(2);
      for (;; std::this_thread::sleep_for(pause)) {
        uint8_t* chunk = memory_.start + random() % chunks * writers::huge_bytes;
        if (what == "pageout") {
          madvise(chunk, writers::huge_bytes, MADV_PAGEOUT);
        } else if (what == "collapse") {
          madvise(chunk, writers::huge_bytes, MADV_COLLAPSE);
        } else if (what == "fork") {
          const pid_t child = fork();
          if (child == 0) {
            usleep(20000);
            _exit(0);
          }
          if (child > 0) waitpid(child, nullptr, 0);
        }
      }
    }).detach();
  }

  void merge_equal_pages() {
    if (madvise(memory_.start + layout_.uniform_at(), 2 * layout_.eighth(), MADV_MERGEABLE) != 0) {
      skip("MADV_MERGEABLE");
    }
  }

  uint64_t progress() const {
    uint64_t sum = 0;
    for (auto* counter : counters_) sum += counter->load(std::memory_order_relaxed);
    return sum;
  }

  std::string check() {
    std::unique_lock lock(mutex_);
    pause_ = true;
    changed_.wait(lock, [this] { return parked_ == running_; });
    writers::Oracle oracle(layout_, memory_.start, /*settled=*/true);
    for (const auto& [offset, bytes] : gone_) oracle.expect_discarded(offset, bytes);
    const auto verdict = oracle.check();
    pause_ = false;
    changed_.notify_all();
    return verdict.error.empty() ? "OK " + std::to_string(verdict.writes) : "BAD " + verdict.error;
  }

  std::string discard(const std::string& how, uint64_t offset, uint64_t bytes) {
    if (offset < layout_.fixed_at() || offset + bytes > layout_.holes_at()) return "BAD offset";
    const bool protects = how == "readonly" || how == "none";
    if (!memory_.comes_back && !protects) gone_.emplace_back(offset, bytes);
    int result;
    void* place = memory_.start + offset;
    if (how == "unmap") {
      result = munmap(place, bytes);
    } else if (how == "move") {
      result = mremap(place, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
                      mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) == MAP_FAILED;
    } else if (how == "readonly" || how == "none") {
      result = mprotect(place, bytes, how == "none" ? PROT_NONE : PROT_READ);
    } else if (how == "punch") {
      result = fallocate(memory_.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                         static_cast<off_t>(offset), static_cast<off_t>(bytes));
    } else {
      result =
          madvise(memory_.start + offset, bytes, how == "remove" ? MADV_REMOVE : MADV_DONTNEED);
    }
    return "DISCARDED " + std::to_string(result == 0 ? 0 : errno);
  }

 private:
  template <class Body>
  void begin(Body body) {
    {
      std::lock_guard lock(mutex_);
      ++running_;
    }
    std::thread(body).detach();
  }

  // Between two writes: stands still while a check is under way.
  void park_if_asked() {
    if (!pause_.load(std::memory_order_relaxed)) return;
    std::unique_lock lock(mutex_);
    ++parked_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !pause_; });
    --parked_;
  }

  // The numbers that all have published up to now.
  void look(uint64_t* seen) const {
    for (unsigned actor = 0; actor < writers::actors; ++actor) {
      seen[actor] = counters_[actor]->load(std::memory_order_acquire);
    }
  }

  // Stores `number`, what was seen, and `number` again, in this order. The
  // fences keep the compiler from reordering; x86 itself does not.
  static void store(uint64_t* begun, uint64_t* seen, uint64_t* done, const uint64_t* what,
                    uint64_t number) {
    *begun = number;
    std::atomic_thread_fence(std::memory_order_release);
    std::memcpy(seen, what, writers::actors * sizeof *what);
    std::atomic_thread_fence(std::memory_order_release);
    *done = number;
  }

  void write_slots(unsigned writer) {
    const writers::Order order(layout_, writer);
    uint64_t seen[writers::actors];
    for (uint64_t k = 1;; ++k) {
      park_if_asked();
      look(seen);
      const uint64_t slot = order.slot(k);
      auto* page = reinterpret_cast<writers::WriterPage*>(memory_.start +
                                                          writers::slot_page(slot) * page_bytes);
      writers::Slot& target = page->slots[writer][writers::slot_place(slot)];
      store(&target.begun, target.seen, &target.done, seen, k);
      counters_[writer]->store(k, std::memory_order_release);
    }
  }

  void sweep(uint64_t pause_us) {
    const uint64_t pages = layout_.small_pages();
    for (uint64_t k = 1;; ++k) {
      park_if_asked();
      auto* page = reinterpret_cast<writers::UniformPage*>(memory_.start + layout_.uniform_at() +
                                                           (k - 1) % pages * page_bytes);
      write_generation(page, (k - 1) / pages + 1, (k - 1) % pages == 0);
      counters_[writers::sweeper]->store(k, std::memory_order_release);
      if (k % pages == 0) std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
    }
  }

  void write_generation(writers::UniformPage* page, uint64_t generation, bool first) {
    if (sweep_file_ < 0) {
      page->generation = generation;
      return;
    }
    if (first) {
      next_page_->generation = generation;
      if (pwrite(sweep_file_, next_page_, page_bytes, 0) != page_bytes) std::abort();
    }
    if (pread(sweep_file_, page, page_bytes, 0) != page_bytes) std::abort();
  }

  void touch(uint64_t pause_us) {
    uint64_t seen[writers::actors];
    for (uint64_t k = 1;;) {
      park_if_asked();
      std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
      if (k > layout_.small_pages()) continue;  // all filled; only parks from now on
      look(seen);
      auto* page = reinterpret_cast<writers::HolePage*>(memory_.start + layout_.holes_at() +
                                                        (k - 1) * page_bytes);
      store(&page->begun, page->seen, &page->done, seen, k);
      counters_[writers::toucher]->store(k, std::memory_order_release);
      ++k;
    }
  }

  Layout layout_;
  Memory memory_;
  writers::Counter* counters_[writers::actors];
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<bool> pause_ = false;
  int running_ = 0;
  int parked_ = 0;
  std::vector<std::pair<uint64_t, uint64_t>> gone_;
  int sweep_file_ = -1;
  writers::UniformPage* next_page_ = nullptr;
};

void print_ranges(const Layout& layout, const Memory& memory, bool split) {
  const uint64_t start = reinterpret_cast<uint64_t>(memory.start);
  std::vector<uint64_t> edges = {0, layout.bytes};
  if (split) edges = {0, layout.uniform_at(), layout.fixed_at(), layout.holes_at(), layout.bytes};
  for (size_t i = 0; i + 1 < edges.size(); ++i) {
    std::printf("RANGE %lx-%lx\n", start + edges[i], start + edges[i + 1]);
  }
  std::printf("READY\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  Layout layout;
  layout.bytes = 64 << 20;
  layout.threads = 2;
  layout.seed = 1;
  std::string kind = "anon", disturb, sweep_by = "store", file;
  uint64_t sweep_us = 1000, touch_us = 5000;
  bool split = false;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    if (option == "--memory") kind = value;
    if (option == "--mib") layout.bytes = std::stoull(value) << 20;
    if (option == "--threads") layout.threads = static_cast<unsigned>(std::stoul(value));
    if (option == "--seed") layout.seed = std::stoull(value);
    if (option == "--disturb") disturb = value;
    if (option == "--sweep-us") sweep_us = std::stoull(value);
    if (option == "--touch-us") touch_us = std::stoull(value);
    if (option == "--sweep-by") sweep_by = value;
    if (option == "--file") file = value;
    if (option == "--split") split = value == "1";
  }
  if (layout.bytes < writers::smallest_bytes || layout.bytes % writers::huge_bytes != 0 ||
      layout.threads > writers::max_writers) {
    std::fprintf(stderr, "writers: bad --mib or --threads\n");
    return 2;
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const Memory memory = make_memory(layout, kind);
  Process process(layout, memory);
  std::istringstream list(disturb);
  for (std::string what; std::getline(list, what, ',');) {
    if (what == "ksm")
      process.merge_equal_pages();
    else
      process.disturb(what);
  }
  process.sweep_by(sweep_by, file);
  process.start(sweep_us, touch_us);
  print_ranges(layout, memory, split);

  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string command, answer = "BAD unknown command";
    uint64_t offset = 0, bytes = 0;
    words >> command >> offset >> bytes;
    if (command == "check") answer = process.check();
    if (command == "progress") answer = "PROGRESS " + std::to_string(process.progress());
    static const std::set<std::string> discards = {"dontneed", "remove", "punch", "unmap",
                                                   "move",     "readonly", "none"};
    if (discards.contains(command)) {
      answer = process.discard(command, offset, bytes);
    }
    if (command == "fixed") {
      answer = "FIXED " + std::to_string(layout.fixed_at()) + " " + std::to_string(layout.eighth());
    }
    std::cout << answer << std::endl;
  }
  _exit(0);
}
