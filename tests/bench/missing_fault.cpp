// What a missing fault costs that the page server answers from an image, beside
// the least that any answer can cost: a thread that waits for the event and
// copies one page that it has at hand. Both in one run, as seen by the thread
// that touches the memory, and twice, because the machine's mood changes.
//
//   missing_fault [PAGES]     default 20000, in random order
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "formats/image_writer.h"
#include "restore/page_server.h"

namespace {

using namespace vmsnap;
using Clock = std::chrono::steady_clock;

template <class T>
T must(Result<T> result, const char* what) {
  if (!result) {
    std::fprintf(stderr, "missing_fault: %s: %s\n", what, result.error().message().c_str());
    std::exit(1);
  }
  return *std::move(result);
}

// Memory whose missing pages raise events.
struct Watched {
  std::byte* memory;
  uint64_t pages;
  Uffd uffd;

  explicit Watched(uint64_t count) : pages(count) {
    memory = static_cast<std::byte*>(::mmap(nullptr, pages * page_size, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    Fd fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
    uffd = must(Uffd::initialize(std::move(fd), 0), "userfaultfd");
    must(uffd.register_range(range(), {.missing = true}), "register");
  }
  ~Watched() {
    uffd.close();
    ::munmap(memory, pages * page_size);
  }
  RemoteRange range() const {
    return {RemotePtr(reinterpret_cast<uint64_t>(memory)), pages * page_size};
  }
};

// Touches every page once, in random order; the microseconds of each.
std::vector<double> touch_all(const Watched& watched) {
  std::vector<uint64_t> order(watched.pages);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(1));
  std::vector<double> took;
  for (const uint64_t page : order) {
    const auto start = Clock::now();
    (void)*const_cast<volatile std::byte*>(watched.memory + page * page_size);
    took.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  std::sort(took.begin(), took.end());
  return took;
}

std::vector<double> measure_bare(uint64_t pages) {
  const Watched watched(pages);
  std::thread server([&] {
    std::array<std::byte, page_size> page;
    page.fill(std::byte{1});
    for (uint64_t answered = 0; answered < pages;) {
      pollfd events = {watched.uffd.fd(), POLLIN, 0};
      ::poll(&events, 1, -1);
      for (const UffdEvent& event : must(watched.uffd.read_events(), "read")) {
        must(watched.uffd.copy(event.address, page), "copy");
        ++answered;
      }
    }
  });
  std::vector<double> took = touch_all(watched);
  server.join();
  return took;
}

std::vector<double> measure_server(const ImageReader& image) {
  const Watched watched(image.page_count());
  PageMarks marks = must(PageMarks::in_memory(image.page_count()), "marks");
  PageServerOptions options;
  options.prefetch = Prefetch::none;
  PageServer server(watched.uffd, image, marks, {{watched.range(), 0, page_size, "bench"}},
                    options);
  std::thread thread([&] { must(server.serve(), "serve"); });
  std::vector<double> took = touch_all(watched);
  server.stop();
  thread.join();
  return took;
}

// Pages that compress about as guest memory does (to less than a half).
void write_image(const std::string& path, uint64_t pages) {
  const Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  auto writer = must(ImageWriter::create(fd.get(), path, pages), "image");
  ImageWriter::Encoder encoder;
  std::mt19937 random(2);
  for (uint64_t number = 0; number < pages; ++number) {
    std::array<std::byte, page_size> page = {};
    for (size_t i = 0; i < page_size; i += 4) {
      const uint32_t value = random() % 3 == 0 ? static_cast<uint32_t>(random()) : number & 0xff;
      std::memcpy(page.data() + i, &value, 4);
    }
    must(writer->write_pages(encoder, std::span(&number, 1), page), "image");
  }
  ImageInfo info;
  info.id = "00000000000000000000000000000000";
  info.regions = {{"range0", 0, pages * page_size, 0}};
  must(writer->finish(info, {}), "image");
}

double at(const std::vector<double>& sorted, double share) {
  const auto index = static_cast<size_t>(share * static_cast<double>(sorted.size()));
  return sorted[std::min(sorted.size() - 1, index)];
}

// What reading and decoding one page costs, without any fault: the median.
double decode_us(const ImageReader& image) {
  std::array<std::byte, page_size> page;
  std::vector<double> took;
  for (uint64_t i = 0; i < image.page_count(); ++i) {
    const auto start = Clock::now();
    must(image.read_page(i, page), "read");
    took.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  std::sort(took.begin(), took.end());
  return at(took, 0.5);
}

void print(const char* what, const std::vector<double>& took) {
  std::printf("%-22s %8.1f %8.1f %8.1f\n", what, at(took, 0.5), at(took, 0.99), took.back());
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t pages = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20000;
  const std::string path =
      (std::filesystem::temp_directory_path() / "vmsnap-missing-fault.img").string();
  write_image(path, pages);
  const auto image = must(ImageReader::open(path), "image");
  std::printf("reading and decoding a page: %.1f us (median)\n", decode_us(*image));
  std::printf("%-22s %8s %8s %8s\n", "microseconds a fault", "p50", "p99", "max");
  for (int round = 0; round < 2; ++round) {
    const std::vector<double> bare = measure_bare(pages), served = measure_server(*image);
    print("bare UFFDIO_COPY", bare);
    print("page server", served);
    std::printf("%-22s %8.2f %8.2f\n", "ratio", at(served, 0.5) / at(bare, 0.5),
                at(served, 0.99) / at(bare, 0.99));
  }
  std::filesystem::remove(path);
}
