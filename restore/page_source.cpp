#include "restore/page_source.h"

#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "formats/damage.h"
#include "formats/store/recorded_working_set.h"
#include "formats/thread.h"

namespace vmsnap {

namespace {

// Pages of the working set that are no farther apart are loaded together with
// what is between them: one copy for all costs less than one for each.
constexpr uint64_t near = 16;

unsigned decoder_threads(unsigned wanted) {
  if (wanted > 0) return wanted;
  const unsigned cpus = std::max(1u, std::thread::hardware_concurrency());
  // One CPU is left to who answers faults.
  return std::clamp(cpus - 1, 1u, 4u);
}

constexpr std::array prefetch_names = {std::string_view("none"), std::string_view("working-set"),
                                       std::string_view("all")};

}  // namespace

std::string_view prefetch_name(Prefetch prefetch) {
  return prefetch_names[static_cast<size_t>(prefetch)];
}

Result<Prefetch> parse_prefetch(std::string_view name) {
  for (size_t i = 0; i < prefetch_names.size(); ++i) {
    if (prefetch_names[i] == name) return static_cast<Prefetch>(i);
  }
  return fail(ErrorCode::usage, "'{}' is none of none, working-set, all", name);
}

Result<std::unique_ptr<PageSource>> PageSource::start(const ImageReader& reader,
                                                      const PageMarks& marks,
                                                      const std::vector<ServedRange>& ranges,
                                                      Prefetch prefetch, unsigned threads) {
  std::unique_ptr<PageSource> source(new PageSource(reader, marks, ranges, prefetch));
  threads = decoder_threads(threads);
  source->ready_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!source->ready_) return fail_errno(errno, "cannot make an eventfd");
  // Each decoder may hold one while another waits to be taken, and the taker one.
  const size_t slots = 2 * threads + 1;
  for (size_t i = 0; i < slots; ++i) {
    auto slot = std::make_unique<DecodedExtent>();
    slot->bytes = std::make_unique<std::byte[]>(DecodedExtent::max_pages * page_size);
    source->free_.push_back(slot.get());
    source->slots_.push_back(std::move(slot));
  }
  VMSNAP_CHECK(source->start_decoders(threads));
  return source;
}

Status PageSource::start_decoders(unsigned count) {
  decoders_running_ = count;
  threads_ = VMSNAP_TRY(start_threads(count, [this] { run_decoder(); }));
  std::lock_guard lock(queue_mutex_);
  decoders_running_ -= count - static_cast<unsigned>(threads_.size());
  return {};
}

PageSource::~PageSource() {
  {
    std::lock_guard lock(queue_mutex_);
    stop_ = true;
  }
  slot_free_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void PageSource::signal_ready() const {
  const uint64_t one = 1;
  // Cannot fail but for a full counter, which is readable all the same.
  [[maybe_unused]] const ssize_t put = ::write(ready_.get(), &one, sizeof one);
}

DecodedExtent* PageSource::take() {
  std::lock_guard lock(queue_mutex_);
  if (decoded_.empty()) {
    uint64_t ignored = 0;
    [[maybe_unused]] const ssize_t got = ::read(ready_.get(), &ignored, sizeof ignored);
    return nullptr;
  }
  DecodedExtent* extent = decoded_.front();
  decoded_.pop_front();
  return extent;
}

void PageSource::give_back(DecodedExtent* extent) {
  {
    std::lock_guard lock(queue_mutex_);
    free_.push_back(extent);
  }
  slot_free_.notify_one();
}

bool PageSource::exhausted() const {
  std::lock_guard lock(queue_mutex_);
  return decoders_running_ == 0 && decoded_.empty() && free_.size() == slots_.size();
}

void PageSource::run_decoder() {
  // The fill may wait, the guest's faults may not: on a machine with few cores
  // the decoders must not take the server's.
  ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), 5);
  for (;;) {
    DecodedExtent* extent = nullptr;
    {
      std::unique_lock lock(queue_mutex_);
      slot_free_.wait(lock, [&] { return stop_ || !free_.empty(); });
      if (stop_) break;
      extent = free_.back();
      free_.pop_back();
    }
    const bool claimed = claim(*extent);
    if (claimed) decode(*extent);
    std::lock_guard lock(queue_mutex_);
    if (!claimed) {
      free_.push_back(extent);
      break;
    }
    decoded_.push_back(extent);
    signal_ready();
  }
  std::lock_guard lock(queue_mutex_);
  --decoders_running_;
  signal_ready();
}

// An image without one, or with one that cannot be read, is filled in the order
// of its pages.
void PageSource::order_working_set() {
  const auto pages = best_working_set(reader_).value_or(std::vector<uint64_t>());
  std::vector<Run> single;
  for (size_t rank = 0; rank < pages.size(); ++rank) {
    const uint64_t page = pages[rank];
    for (size_t i = 0; i < ranges_.size(); ++i) {
      const ServedRange& range = ranges_[i];
      if (page < range.first_page || page - range.first_page >= range.page_count()) continue;
      const uint64_t unit_pages = range.unit / page_size;
      const uint64_t unit = (page - range.first_page) / unit_pages;
      single.push_back({i, range.first_page + unit * unit_pages, unit_pages, rank});
    }
  }
  std::ranges::sort(single, {},
                    [](const Run& run) { return std::pair(run.range, run.first_page); });
  for (const Run& run : single) {
    if (!working_set_.empty()) {
      Run& last = working_set_.back();
      const uint64_t joined = run.first_page + run.pages - last.first_page;
      if (last.range == run.range && joined <= DecodedExtent::max_pages &&
          run.first_page < last.first_page + last.pages + near) {
        last.pages = joined;
        last.rank = std::min(last.rank, run.rank);
        continue;
      }
    }
    working_set_.push_back(run);
  }
  std::ranges::sort(working_set_, {}, &Run::rank);
}

// Finds the next extent to load; false when there is none.
bool PageSource::claim(DecodedExtent& extent) {
  std::lock_guard lock(claim_mutex_);
  if (!ordered_) {
    order_working_set();
    ordered_ = true;
  }
  if (next_of_working_set_ < working_set_.size()) {
    const Run& run = working_set_[next_of_working_set_++];
    extent.range = run.range;
    extent.first_page = run.first_page;
    extent.pages = run.pages;
    return true;
  }
  return prefetch_ == Prefetch::all && claim_of_rest(extent);
}

bool PageSource::claim_of_rest(DecodedExtent& extent) {
  for (; next_range_ < ranges_.size(); ++next_range_, next_page_ = 0) {
    const ServedRange& range = ranges_[next_range_];
    const uint64_t end = range.first_page + range.page_count();
    next_page_ = std::max(next_page_, range.first_page);
    // A part of the page tree that cannot be read: its pages are tried one by
    // one, so that each is found unreadable.
    const uint64_t page = reader_.next_data_page(next_page_).value_or(next_page_);
    if (page >= end) continue;
    const uint64_t index = (page - range.first_page) / DecodedExtent::max_pages;
    extent.range = next_range_;
    extent.first_page = range.first_page + index * DecodedExtent::max_pages;
    extent.pages = std::min(DecodedExtent::max_pages, end - extent.first_page);
    next_page_ = extent.first_page + extent.pages;
    return true;
  }
  return false;
}

void PageSource::decode(DecodedExtent& extent) const {
  using enum DecodedExtent::State;
  extent.delayed.reset();
  const auto state_of = [&](uint64_t page, std::span<std::byte, page_size> out) {
    if (!marks_.wanted(page)) return zero;
    // What is in the way of one page is in the way of others: not tried each.
    if (extent.delayed) return later;
    const Result<PageKind> kind = reader_.read_page(page, out);
    if (kind) return *kind == PageKind::data ? data : zero;
    if (is_lasting(kind.error())) return unreadable;
    extent.delayed = kind.error();
    return later;
  };
  for (uint64_t i = 0; i < extent.pages; ++i) {
    const std::span<std::byte, page_size> out(extent.bytes.get() + i * page_size, page_size);
    extent.states[i] = state_of(extent.first_page + i, out);
    if (extent.states[i] != data) std::memset(out.data(), 0, out.size());
  }
}

}  // namespace vmsnap
