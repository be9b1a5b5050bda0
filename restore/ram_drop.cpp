#include "restore/ram_drop.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <thread>

#include "formats/file.h"
#include "formats/test_point.h"
#include "formats/thread.h"
#include "restore/removals.h"
#include "snap/vmm/injector.h"
#include "snap/vmm/preflight.h"

namespace vmsnap {

namespace {

// Whole huge pages, and no power of two, as what guests give back is.
constexpr uint64_t window_bytes = uint64_t{62} << 20;

std::vector<RemoteRange> windows_of(RemoteRange range) {
  std::vector<RemoteRange> windows;
  for (RemotePtr at = range.start; at < range.end(); at = at + window_bytes) {
    windows.push_back({at, std::min(window_bytes, range.end() - at)});
  }
  return windows;
}

// Our own removal: a whole window.
bool is_window(const std::vector<ServedRange>& ranges, const UffdEvent& event) {
  return std::ranges::any_of(ranges, [&](const ServedRange& served) {
    const RemoteRange& range = served.range;
    return event.address >= range.start && event.address < range.end() &&
           (event.address - range.start) % window_bytes == 0 &&
           event.length == std::min(window_bytes, range.end() - event.address);
  });
}

// Marks what the guest gave back by the events in the marks' buffer, and then
// forgets the events: a successor may find them there.
void note_removals(const std::vector<ServedRange>& ranges, PageMarks& marks) {
  std::vector<UffdEvent> events = Uffd::parse_messages(marks.event_buffer());
  std::erase_if(events, [&](const UffdEvent& event) { return is_window(ranges, event); });
  for (const Removal& gone : removals_of(events, ranges)) {
    marks.set_removed(gone.first_page, gone.pages);
  }
  marks.forget_events(marks.event_buffer().size());
}

// Reads the events that are there. Faults among them are raised again by the
// wake with which a page server begins.
Status drain_events(const Uffd& uffd, const std::vector<ServedRange>& ranges, PageMarks& marks) {
  while (!VMSNAP_TRY(uffd.read_messages(marks.event_buffer())).empty()) {
    note_removals(ranges, marks);
  }
  return {};
}

// A range that the process unmapped meanwhile is none of our business any more.
template <typename Change>
Status change_protection(const Uffd& uffd, const std::vector<ServedRange>& ranges, PageMarks& marks,
                         const Change& change) {
  for (const ServedRange& range : ranges) {
    while (VMSNAP_TRY(change(range.range)) == ProtectOutcome::try_again) {
      VMSNAP_CHECK(drain_events(uffd, ranges, marks));
      ::usleep(100);
    }
  }
  return {};
}

tl::unexpected<Error> refuse(const Process& process, const std::string& block, const char* why,
                             const char* remedy) {
  return tl::unexpected(
      Error(ErrorCode::refused, fmt::format("{}: memory '{}' {}", process.describe(), block, why))
          .with_remedy(remedy));
}

const std::string& block_of(const GuestMemory& memory, const MemoryPiece& piece) {
  const auto found =
      std::find_if(memory.blocks.begin(), memory.blocks.end(), [&](const MemoryBlock& block) {
        return piece.range.start >= block.range.start && piece.range.start < block.range.end();
      });
  return found->name;
}

}  // namespace

Result<GuestMemory> droppable_memory(const Process& process, std::vector<MemoryBlock> blocks) {
  GuestMemory memory = VMSNAP_TRY(map_guest_memory(process, std::move(blocks)));
  for (const MemoryPiece& piece : memory.pieces) {
    const std::string& block = block_of(memory, piece);
    if (piece.backing == Backing::hugetlb_private || piece.backing == Backing::hugetlb_shared) {
      return refuse(process, block, "is hugetlbfs, whose pages the host cannot use for anything else",
                    "Only VMs with ordinary memory can be parked.");
    }
    if (piece.backing != Backing::anonymous && piece.backing != Backing::shared_memory) {
      return refuse(process, block, "is a private mapping of a file, which has pages of its own",
                    "Give the VM anonymous or shared memory.");
    }
  }
  const std::string locked = VMSNAP_TRY(process.status_field("VmLck"));
  uint64_t kib = 0;
  std::from_chars(locked.data(), locked.data() + locked.size(), kib);
  if (kib > 0) {
    return tl::unexpected(Error(ErrorCode::refused,
                                fmt::format("{} has {} KiB of memory locked", process.describe(), kib))
                              .with_remedy("Start it without -overcommit mem-lock=on."));
  }
  VMSNAP_CHECK(check_not_pinned(process));
  VMSNAP_CHECK(check_not_shared(process, memory));
  return memory;
}

std::vector<ServedRange> served_ranges(const GuestMemory& memory) {
  std::vector<ServedRange> ranges;
  for (const MemoryPiece& piece : memory.pieces) {
    ranges.push_back({piece.range, piece.first_page, piece.unit_bytes, block_of(memory, piece)});
  }
  return ranges;
}

Status freeze_memory(const Uffd& uffd, const std::vector<ServedRange>& ranges, PageMarks& marks) {
  for (const ServedRange& range : ranges) {
    const auto outcome =
        VMSNAP_TRY(uffd.register_range(range.range, {.missing = true, .write_protect = true}));
    if (outcome != RegisterOutcome::done) {
      return fail(ErrorCode::refused, "memory '{}' cannot be watched{}", range.name,
                  outcome == RegisterOutcome::busy ? ": another userfaultfd does" : "");
    }
  }
  return change_protection(uffd, ranges, marks,
                           [&](RemoteRange range) { return uffd.write_protect(range); });
}

Status thaw_memory(const Uffd& uffd, const std::vector<ServedRange>& ranges, PageMarks& marks) {
  VMSNAP_CHECK(drain_events(uffd, ranges, marks));
  return change_protection(uffd, ranges, marks,
                           [&](RemoteRange range) { return uffd.unprotect(range); });
}

Status release_memory(const Uffd& uffd, const std::vector<ServedRange>& ranges, PageMarks& marks) {
  VMSNAP_CHECK(thaw_memory(uffd, ranges, marks));
  for (const ServedRange& range : ranges) VMSNAP_CHECK(uffd.unregister_range(range.range));
  return drain_events(uffd, ranges, marks);
}

namespace {

// Reads events in a thread of its own, while a thread of the VMM waits for that.
class EventDrain {
 public:
  EventDrain() = default;
  EventDrain(const EventDrain&) = delete;
  EventDrain& operator=(const EventDrain&) = delete;
  ~EventDrain() { (void)end(); }

  Status start(const Uffd& uffd, const std::vector<ServedRange>& ranges, PageMarks& marks) {
    thread_ = VMSNAP_TRY(start_thread([&uffd, &ranges, &marks, this] {
      while (!stopped_ && ended_) {
        pollfd event = {uffd.fd(), POLLIN, 0};
        if (::poll(&event, 1, 10) <= 0) continue;
        VMSNAP_TEST_POINT("park.removing");
        ended_ = drain_events(uffd, ranges, marks);
      }
    }));
    return {};
  }
  Status end() {
    stopped_ = true;
    if (thread_.joinable()) thread_.join();
    return ended_;
  }

 private:
  Status ended_;
  std::atomic<bool> stopped_ = false;
  std::thread thread_;
};

}  // namespace

Status drop_memory(const Process& process, const Uffd& uffd, const GuestMemory& memory,
                   PageMarks& marks, const std::function<void()>& let_go) {
  const std::vector<ServedRange> ranges = served_ranges(memory);
  std::vector<RemoteRange> private_windows;
  uint64_t total = 0, done = 0;
  for (const MemoryPiece& piece : memory.pieces) {
    total += piece.range.length;
    if (piece.shared()) continue;
    const auto windows = windows_of(piece.range);
    private_windows.insert(private_windows.end(), windows.begin(), windows.end());
  }
  const auto about_to_drop = [&](const RemoteRange& window) {
    if (done < total / 2 && done + window.length >= total / 2) VMSNAP_TEST_POINT("park.half_dropped");
    done += window.length;
  };

  for (const MemoryPiece& piece : memory.pieces) {
    if (!piece.shared()) continue;
    // It was opened for reading.
    const Fd file = VMSNAP_TRY(
        open_file(fmt::format("/proc/self/fd/{}", piece.file->get()), O_RDWR));
    for (const RemoteRange& window : windows_of(piece.range)) {
      about_to_drop(window);
      const uint64_t offset = piece.file_offset + (window.start - piece.range.start);
      if (::fallocate(file.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      static_cast<off_t>(offset), static_cast<off_t>(window.length)) < 0) {
        return fail_errno(errno, "cannot hand back the shared memory of {}", process.describe());
      }
    }
  }
  if (private_windows.empty()) return {};

  enum Answer : int64_t { go_on = 0, nobody = 1 };
  const auto errand = [&](RemoteThread& thread, InjectorLink& link) -> Result<int64_t> {
    let_go();
    for (size_t i = 0; i < private_windows.size(); ++i) {
      if (link.ask(static_cast<int64_t>(i), nobody) == nobody) {
        return tl::unexpected(stood_still(process));
      }
      const RemoteRange& window = private_windows[i];
      const int64_t dropped = VMSNAP_TRY(thread.call(
          SYS_madvise, {window.start.address(), window.length, uint64_t{MADV_DONTNEED}}));
      if (dropped < 0) return dropped;
    }
    return 0;
  };
  EventDrain drain;
  VMSNAP_CHECK(drain.start(uffd, ranges, marks));
  const Result<int64_t> dropped = run_injected(process, errand, [&](int64_t i) -> int64_t {
    about_to_drop(private_windows[static_cast<size_t>(i)]);
    return go_on;
  });
  const Status drained = drain.end();
  if (!dropped) return tl::unexpected(dropped.error());
  VMSNAP_CHECK(drained);
  if (*dropped < 0) {
    return fail_errno(static_cast<int>(-*dropped), "{} cannot hand back its memory",
                      process.describe());
  }
  return {};
}

namespace {

Result<bool> is_traced(const Process& process) {
  for (const pid_t tid : VMSNAP_TRY(process.threads())) {
    const auto status =
        read_small_file(fmt::format("/proc/{}/task/{}/status", process.pid(), tid), 64 << 10);
    if (!status) continue;  // it has just ended
    constexpr std::string_view field = "TracerPid:\t";
    const size_t at = status->find(field);
    if (at != std::string::npos && (*status)[at + field.size()] != '0') return true;
  }
  return false;
}

}  // namespace

Status settle_memory(const Process& process, const Uffd& uffd,
                     const std::vector<ServedRange>& ranges, PageMarks& marks) {
  note_removals(ranges, marks);  // what the predecessor had read
  // A call of its making may still wait until its event is read. It ends then,
  // and its helper, who finds us gone, lets go of the thread.
  constexpr std::chrono::seconds limit{30};
  const auto deadline = std::chrono::steady_clock::now() + limit;
  for (;;) {
    VMSNAP_CHECK(drain_events(uffd, ranges, marks));
    if (!VMSNAP_TRY(is_traced(process))) break;
    if (std::chrono::steady_clock::now() > deadline) {
      return tl::unexpected(
          Error(ErrorCode::refused, fmt::format("{} is being traced", process.describe()))
              .with_remedy("Detach the debugger, and try again."));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return thaw_memory(uffd, ranges, marks);
}

}  // namespace vmsnap
