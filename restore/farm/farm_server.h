// Serves the clones of one image: brings each page into the memory that they
// share when the first of them touches it, and the rest in the background.
//
// A few threads wait for the events of all clones and answer them; a page that
// is slow to read keeps one thread, not the others. A page is read once,
// however many clones wait for it. Who touches it
//
//   and it is there              is woken, and maps it by himself
//   and it has data              it is put into the cache (page_cache.h)
//   and it is zero in the image  gets the kernel's page of zeros, and so do its
//                                neighbours, with no memory used
//   and he gave it back before   gets zeros
//   and another gave it back     gets a copy of his own
//   and it cannot be read back   is given poison: SIGBUS, a memory error
//   and it cannot be read now    waits; it is tried again
//
// Order: events of a clone are read and its removals marked under its lock,
// held alone; image content is copied into a clone itself only under the same
// lock, shared, after another look at the marks. So what a clone gave back
// never comes again, as far as the kernel tells in time: between the reading
// of a removal and the page's leaving the cache, some microseconds, the clone
// could see its own old page again.
//
// Sources: userfaultfd(2), ioctl_userfaultfd(2), epoll(7).
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <shared_mutex>
#include <thread>
#include <vector>

#include "formats/image_reader.h"
#include "formats/latency_histogram.h"
#include "restore/episode.h"
#include "restore/farm/in_flight.h"
#include "restore/farm/page_cache.h"
#include "restore/page_marks.h"
#include "restore/page_source.h"
#include "restore/put_off.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

// What is known of one clone to serve it.
struct CloneToServe {
  std::string name;
  Uffd uffd;  // registered for missing faults in `ranges`; O_NONBLOCK
  Fd pidfd;
  PageMarks marks;  // what it gave back, and events not yet acted upon
  std::vector<ServedRange> ranges;  // pages of 4 KiB, within the image
};

struct FarmServerOptions {
  Prefetch prefetch = Prefetch::all;  // of what nobody touched
  unsigned threads = 0;  // that answer faults; 0: by the number of CPUs
};

class FarmServer {
 public:
  // Both must outlive this.
  FarmServer(const ImageReader& reader, PageCache& cache, FarmServerOptions options);
  ~FarmServer();
  FarmServer(const FarmServer&) = delete;
  FarmServer& operator=(const FarmServer&) = delete;

  // Then add() what there is already, and start() the threads: a page that one clone gave
  // back must not come back because another touched it before that was known.
  Status prepare();
  Status start();
  // Begins with what a predecessor had read and not done, and wakes all who
  // wait. Any thread.
  Status add(CloneToServe clone);
  // Clones that live.
  size_t clones() const;
  // Counters of this server, since it started; for people and tests.
  nlohmann::json status() const;

 private:
  using Clock = std::chrono::steady_clock;

  struct Clone {
    explicit Clone(CloneToServe to_serve) : what(std::move(to_serve)) {}
    CloneToServe what;
    uint64_t number = 0;
    std::shared_mutex order;  // see above
    std::atomic<bool> gone = false;
    std::atomic<uint64_t> events = 0, brought = 0, found = 0, zero = 0, alone = 0, removed = 0,
                          poisoned = 0;
  };
  using ClonePtr = std::shared_ptr<Clone>;
  struct Fault {
    ClonePtr clone;
    size_t range = 0;
    uint64_t page = 0;  // of the image
    Clock::time_point seen;
  };
  // again: there are events to read first; later: the page cannot be read now;
  // left: with who reads it.
  enum class Answer { done, again, later, left };

  void run_thread();
  void serve_clone(uint64_t number);
  std::vector<Fault> read_events(const ClonePtr& clone);
  Status note_removals(Clone& clone, const std::vector<UffdEvent>& events);
  void answer(Fault fault);
  Result<Answer> try_answer(const Fault& fault);
  Result<Answer> bring(const Fault& fault);
  Result<Answer> give_zero(const Fault& fault);
  void give_zero_around(const Fault& fault);
  Result<Answer> give_alone(const Fault& fault, std::span<const std::byte> bytes);
  Result<Answer> give_up(const Fault& fault, const Error& why);
  Result<Answer> wake(const Fault& fault);
  void read_ahead(uint64_t page);
  void push(std::vector<Fault> faults);
  bool pop(Fault* fault);
  ClonePtr find(uint64_t number) const;
  void drop(uint64_t number);
  void fail_clone(Clone& clone, const Error& error);

  void run_prefetch();
  Result<bool> prefetch_round();
  Status prefetch_extent(const DecodedExtent& extent);

  const ImageReader& reader_;
  PageCache& cache_;
  const FarmServerOptions options_;
  Fd epoll_, queued_, stopped_;  // the latter two: eventfds
  std::atomic<bool> stop_ = false;
  std::vector<std::thread> threads_;
  InFlight<Fault> in_flight_;

  mutable std::mutex clones_mutex_;
  std::map<uint64_t, ClonePtr> clones_;
  uint64_t next_number_ = 1;

  std::mutex queue_mutex_;
  std::vector<Fault> queue_;
  PutOff<Fault> put_off_;  // their pages cannot be read now

  PageMarks wanted_;  // for the source: what was put already
  std::atomic<uint64_t> read_ = 0, read_ahead_ = 0, prefetched_ = 0;
  std::atomic<uint64_t> unreadable_ = 0;  // given up, for clones that have ended, too
  std::atomic<bool> prefetch_done_ = false;
  Episode delay_;
  LatencyHistogram latency_;
};

}  // namespace vmsnap
