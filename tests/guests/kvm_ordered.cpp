// A VMM of one page of code: a guest of five instructions under KVM_RUN, with
// the memory of ordered_layout.h, so that the snapshot of RAM that KVM writes
// is tested through the kernel's own paths.
//
// kvm_ordered [--mib N] [--memory anon|thp|memfd] [--probe-seconds S]
//
// Prints "RANGE start-end" (hex, our addresses) and "READY", then runs until it
// is killed or its stdin ends. Commands on stdin, one line each:
//   check     stops the vCPU, checks the memory, prints "OK edges counter" or
//             "BAD reason", and lets the guest go on
//   progress  prints "PROGRESS counter"
// Exit status 77 and the reason, if KVM does not run such a guest here.
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>

#include "ordered_layout.h"

namespace {

constexpr uint32_t counters_at = 0x100000;  // guest-physical; the code is at 0x1000
constexpr uint32_t code_at = 0x1000;

[[noreturn]] void skip(const std::string& reason) {
  std::printf("SKIP %s\n", reason.c_str());
  std::fflush(stdout);
  _exit(77);
}

int kvm_call(int fd, unsigned long request, void* argument, const char* name) {
  const int result = ioctl(fd, request, argument);
  if (result < 0) skip(std::string(name) + ": " + std::strerror(errno));
  return result;
}

uint8_t* map_memory(const std::string& kind, uint64_t bytes) {
  void* map = MAP_FAILED;
  constexpr uint64_t huge = 2 << 20;
  if (kind == "memfd") {
    const int fd = memfd_create("guest-ram", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) return nullptr;
    map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return map == MAP_FAILED ? nullptr : static_cast<uint8_t*>(map);
  }
  map = mmap(nullptr, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  auto* aligned = reinterpret_cast<uint8_t*>((reinterpret_cast<uint64_t>(map) + huge - 1) & -huge);
  madvise(aligned, bytes, kind == "thp" ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return aligned;
}

// mov edi, first; inc [edi]; add edi, 4096; cmp edi, end; jb; jmp to the mov.
void write_code(uint8_t* memory, uint32_t end) {
  uint8_t code[] = {0xbf, 0,    0,    0,    0,           // mov  $first, %edi
                    0xff, 0x07,                          // incl (%edi)
                    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,  // add  $4096, %edi
                    0x81, 0xff, 0,    0,    0,    0,     // cmp  $end, %edi
                    0x72, 0xf0,                          // jb   to the incl
                    0xeb, 0xe9};                         // jmp  to the mov
  const uint32_t first = counters_at;
  std::memcpy(code + 1, &first, 4);
  std::memcpy(code + 15, &end, 4);
  std::memcpy(memory + code_at, code, sizeof code);
}

class Guest {
 public:
  Guest(uint8_t* memory, uint64_t bytes) : memory_(memory), bytes_(bytes) {
    const int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) skip(std::string("/dev/kvm: ") + std::strerror(errno));
    const int vm = kvm_call(kvm, KVM_CREATE_VM, nullptr, "KVM_CREATE_VM");
    kvm_userspace_memory_region region = {};
    region.memory_size = bytes;
    region.userspace_addr = reinterpret_cast<uint64_t>(memory);
    kvm_call(vm, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
    vcpu_ = kvm_call(vm, KVM_CREATE_VCPU, nullptr, "KVM_CREATE_VCPU");
    const int run_bytes = kvm_call(kvm, KVM_GET_VCPU_MMAP_SIZE, nullptr, "KVM_GET_VCPU_MMAP_SIZE");
    run_ = static_cast<kvm_run*>(
        mmap(nullptr, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_, 0));
    if (run_ == MAP_FAILED) skip("cannot map the vCPU");

    for (uint64_t at = counters_at; at < bytes; at += ordered::page_bytes) {
      ordered::fill_page(reinterpret_cast<uint32_t*>(memory + at), static_cast<uint32_t>(at));
    }
    write_code(memory, static_cast<uint32_t>(bytes));
    start_in_protected_mode();
  }

  uint32_t counter() const {
    return reinterpret_cast<std::atomic<uint32_t>*>(memory_ + counters_at)->load();
  }

  // The vCPU's thread. SIGUSR1 interrupts KVM_RUN; then we wait while a check
  // is under way. immediate_exit closes the gap before KVM_RUN is entered.
  void run() {
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        parked_ = pause_;
        changed_.notify_all();
        changed_.wait(lock, [this] { return !pause_; });
        parked_ = false;
        run_->immediate_exit = 0;
      }
      if (ioctl(vcpu_, KVM_RUN, 0) != 0 && errno != EINTR && errno != EAGAIN) {
        skip(std::string("KVM_RUN: ") + std::strerror(errno));
      }
      if (run_->exit_reason != KVM_EXIT_INTR && run_->exit_reason != 0) {
        skip("KVM_RUN ended with exit reason " + std::to_string(run_->exit_reason));
      }
    }
  }

  std::string check(pthread_t runner) {
    std::unique_lock lock(mutex_);
    pause_ = true;
    run_->immediate_exit = 1;
    while (!parked_) {
      pthread_kill(runner, SIGUSR1);
      changed_.wait_for(lock, std::chrono::milliseconds(20));
    }
    const auto verdict = ordered::check(
        memory_ + counters_at, static_cast<uint32_t>((bytes_ - counters_at) / ordered::page_bytes),
        counters_at);
    pause_ = false;
    changed_.notify_all();
    if (!verdict.error.empty()) return "BAD " + verdict.error;
    return ordered::text("OK %u %u", verdict.edges, verdict.counter);
  }

 private:
  // Flat 32-bit segments, no paging, no descriptor table: none is ever loaded.
  void start_in_protected_mode() {
    kvm_sregs sregs;
    kvm_call(vcpu_, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
    kvm_segment flat = {};
    flat.limit = 0xffffffff;
    flat.present = flat.s = flat.g = flat.db = 1;
    flat.type = 3;  // data, writable, accessed
    flat.selector = 16;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
    flat.type = 11;  // code, readable, accessed
    flat.selector = 8;
    sregs.cs = flat;
    sregs.cr0 |= 1;
    kvm_call(vcpu_, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
    kvm_regs regs = {};
    regs.rip = code_at;
    regs.rflags = 2;
    kvm_call(vcpu_, KVM_SET_REGS, &regs, "KVM_SET_REGS");
  }

  uint8_t* memory_;
  uint64_t bytes_;
  int vcpu_ = -1;
  kvm_run* run_ = nullptr;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool pause_ = false;
  bool parked_ = false;
};

}  // namespace

int main(int argc, char** argv) {
  uint64_t bytes = 32 << 20;
  std::string kind = "anon";
  int probe_seconds = 10;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--mib") bytes = std::strtoull(argv[i + 1], nullptr, 10) << 20;
    if (option == "--memory") kind = argv[i + 1];
    if (option == "--probe-seconds") probe_seconds = std::atoi(argv[i + 1]);
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  struct sigaction action = {};
  action.sa_handler = [](int) {};
  sigaction(SIGUSR1, &action, nullptr);

  uint8_t* memory = map_memory(kind, bytes);
  if (!memory) skip("cannot map the guest's memory");
  Guest guest(memory, bytes);
  std::thread runner([&] { guest.run(); });

  // Is it really running? A hypervisor below may take the guest and never move.
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(probe_seconds);
  while (guest.counter() < 2) {
    if (std::chrono::steady_clock::now() > limit) {
      skip("the guest made no progress in " + std::to_string(probe_seconds) + " s");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  const uint64_t start = reinterpret_cast<uint64_t>(memory);
  std::cout << std::hex << "RANGE " << start << "-" << start + bytes << std::dec << "\nREADY"
            << std::endl;
  for (std::string line; std::getline(std::cin, line);) {
    if (line == "check")
      std::cout << guest.check(runner.native_handle()) << std::endl;
    else if (line == "progress")
      std::cout << "PROGRESS " << guest.counter() << std::endl;
    else
      std::cout << "BAD unknown command" << std::endl;
  }
  _exit(0);
}
