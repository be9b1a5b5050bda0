#include "formats/export.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <functional>
#include <future>
#include <span>
#include <utility>
#include <vector>

#include "formats/file.h"
#include "formats/interrupt.h"
#include "formats/processors.h"

namespace vmsnap {

namespace {

constexpr uint64_t window_pages = 512;

// Pages of an image, decoded.
struct Window {
  uint64_t first = 0, end = 0;    // pages
  std::vector<std::byte> bytes;   // of all of them, zeros included
  struct Run {
    uint64_t first = 0, end = 0;  // pages
  };
  std::vector<Run> data;          // what is not zero, ascending

  std::span<const std::byte> of(Run run) const {
    return std::span(bytes).subspan((run.first - first) * page_size, (run.end - run.first) * page_size);
  }
};

// Says which page it was in terms of regions, which is what the user knows.
Error in_region(const ImageReader& image, uint64_t page, Error error) {
  const Region* region = find_region(image.info().regions, page);
  if (!region) return error;
  return std::move(error).with_context(
      fmt::format("cannot read the page at offset {:#x} of region {}",
                  (page - region->first_page) * page_size, region->name));
}

Result<uint64_t> next_data_page(const ImageReader& image, uint64_t page) {
  return image.next_data_page(page).map_error(
      [&](Error error) { return in_region(image, page, std::move(error)); });
}

Result<Window> decode(const ImageReader& image, Window window) {
  window.data.clear();
  window.bytes.assign((window.end - window.first) * page_size, std::byte{0});
  for (uint64_t page = window.first;; ++page) {
    page = VMSNAP_TRY(next_data_page(image, page));
    if (page >= window.end) return window;
    const std::span<std::byte, page_size> out(&window.bytes[(page - window.first) * page_size], page_size);
    const auto kind = image.read_page(page, out);
    if (!kind) return tl::unexpected(in_region(image, page, kind.error()));
    if (!window.data.empty() && window.data.back().end == page) {
      ++window.data.back().end;
    } else {
      window.data.push_back({page, page + 1});
    }
  }
}

// Gives `take` every window that is not all zeros, in order; as many as there are
// processors are decoded meanwhile.
Status for_each_window(const ImageReader& image, const std::function<Status(const Window&)>& take) {
  const size_t at_once = default_threads();
  std::deque<std::future<Result<Window>>> decoded;
  Window spare;
  for (uint64_t page = 0;;) {
    while (decoded.size() < at_once && page < image.page_count()) {
      page = VMSNAP_TRY(next_data_page(image, page));
      if (page >= image.page_count()) break;
      spare.first = page - page % window_pages;
      page = spare.end = std::min(spare.first + window_pages, image.page_count());
      // Where there can be no more threads, when it is asked for.
      decoded.push_back(std::async(std::launch::async | std::launch::deferred,
                                   [&image, window = std::exchange(spare, {})]() mutable {
                                     return decode(image, std::move(window));
                                   }));
    }
    if (decoded.empty()) return {};
    VMSNAP_CHECK(check_interrupted());
    Window window = VMSNAP_TRY(decoded.front().get());
    decoded.pop_front();
    VMSNAP_CHECK(take(window));
    spare = std::move(window);  // its memory
  }
}

}  // namespace

Result<uint64_t> export_raw(const ImageReader& image, const std::string& out_path, bool replace) {
  AtomicFile file = VMSNAP_TRY(AtomicFile::create(out_path, replace));
  const uint64_t length = image.page_count() * page_size;
  if (::ftruncate(file.fd(), static_cast<off_t>(length)) < 0) {
    return fail_errno(errno, "cannot make {} {} bytes long", out_path, length);
  }
  uint64_t written = 0;
  VMSNAP_CHECK(for_each_window(image, [&](const Window& window) -> Status {
    for (const Window::Run run : window.data) {
      const auto bytes = window.of(run);
      VMSNAP_CHECK(write_all_at(file.fd(), bytes, run.first * page_size, out_path));
      written += bytes.size();
    }
    return {};
  }));
  VMSNAP_CHECK(file.commit());
  return written;
}

Status export_raw(const ImageReader& image, std::ostream& out) {
  const auto write = [&](std::span<const std::byte> bytes) -> Status {
    out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (!out) return fail(ErrorCode::io, "cannot write to standard output");
    return {};
  };
  const std::vector<std::byte> zeros(window_pages * page_size);
  uint64_t done = 0;  // pages
  const auto write_zeros = [&](uint64_t end) -> Status {
    while (done < end) {
      const uint64_t count = std::min(window_pages, end - done);
      VMSNAP_CHECK(write(std::span(zeros).first(count * page_size)));
      done += count;
    }
    return {};
  };
  VMSNAP_CHECK(for_each_window(image, [&](const Window& window) -> Status {
    VMSNAP_CHECK(write_zeros(window.first));
    done = window.end;
    return write(window.bytes);
  }));
  VMSNAP_CHECK(write_zeros(image.page_count()));
  out.flush();
  if (!out) return fail(ErrorCode::io, "cannot write to standard output");
  return {};
}

}  // namespace vmsnap
