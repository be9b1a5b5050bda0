#include "snap/arming.h"

#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "formats/test_point.h"

namespace vmsnap {

namespace {

// So much takes 0.1 ms, and may keep a processor from an early writer.
constexpr uint64_t step_bytes = 4 << 20;
constexpr size_t step_runs = 16;
// Holes nearer to each other than this are looked through in one go.
constexpr uint64_t hole_gap_bytes = 2 << 20;
// What lies between pages that are to be protected again, if it is no more, is
// protected with them: to look at a page that is protected takes a hundredth of a call,
// in which the processors of a guest that runs must be told (10 us, in a VM).
constexpr uint64_t protect_gap_units = 64;
constexpr int max_rounds = 16;
constexpr size_t few_runs = 128;

// Somebody may wait for this processor: a writer, or the handler, which lets it through
// but does not interrupt us (thread_priority.h).
void end_turn() { ::sched_yield(); }

// hugetlb pages are so few that there is nothing to gain.
bool armed_ahead(const CapturedPiece& piece) { return piece.piece.unit_bytes == page_size; }

void set_armed(CapturedPiece& piece, uint64_t first_unit, uint64_t end_unit) {
  for (uint64_t unit = first_unit; unit < end_unit; ++unit) piece.states.set(unit, UnitState::armed);
}

void set_armed(CapturedPiece& piece, const std::vector<RemoteRange>& runs) {
  for (const RemoteRange& run : runs) {
    const auto [first, end] = piece.touched_by(run);
    set_armed(piece, first, end);
  }
}

// Marks what the file holds of the piece.
Status set_armed_by_data(const Process& process, CapturedPiece& piece) {
  const int fd = piece.piece.file->get();
  const off_t start = static_cast<off_t>(piece.piece.file_offset);
  const off_t end = start + static_cast<off_t>(piece.piece.range.length);
  for (off_t at = start; at < end;) {
    const off_t data = ::lseek(fd, at, SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;
    const off_t hole = data < 0 ? -1 : ::lseek(fd, data, SEEK_HOLE);
    if (hole < 0) return fail_errno(errno, "cannot find the data in shared memory of {}", process.describe());
    if (data >= end) break;
    set_armed(piece, static_cast<uint64_t>(data - start) / page_size,
              static_cast<uint64_t>(std::min(hole, end) - start + page_size - 1) / page_size);
    at = hole;
  }
  return {};
}

// Marks what a file of shared memory holds. Its holes become pages through a
// missing fault, which the fault handler answers, since they were registered; or,
// if they were allocated (fallocate(2)), though no data yet, through a write.
Status set_armed_by_file(const Process& process, const PageMap& pagemap, CapturedPiece& piece) {
  const int fd = piece.piece.file->get();
  if (piece.piece.backing == Backing::hugetlb_shared) {
    // No SEEK_DATA there. If the file has no more blocks than the process has
    // pages of it, what is not mapped is a hole; else all may be data.
    struct stat about = {};
    if (::fstat(fd, &about) < 0) return fail_errno(errno, "cannot look at shared memory");
    piece.expected_blocks = static_cast<uint64_t>(about.st_blocks);
    const auto mapped = VMSNAP_TRY(pagemap.populated(piece.piece.range));
    uint64_t mapped_bytes = 0;
    for (const RemoteRange& run : mapped) mapped_bytes += run.length;
    if (mapped_bytes / 512 == piece.expected_blocks) {
      set_armed(piece, mapped);
    } else {
      set_armed(piece, 0, piece.states.count());
    }
    return {};
  }
  return set_armed_by_data(process, piece);
}

// The same for a little of it. Without SEEK_HOLE, which would look through all that
// follows.
void set_armed_by_data_in(CapturedPiece& piece, const UnitRun& run) {
  const int fd = piece.piece.file->get();
  for (uint64_t unit = run.first; unit < run.end(); ++unit) {
    const auto at = static_cast<off_t>(piece.piece.file_offset + unit * page_size);
    if (::lseek(fd, at, SEEK_DATA) == at) piece.states.set(unit, UnitState::armed);
  }
}

// What lies between the runs, and what lies between what is near to it.
std::vector<RemoteRange> holes_between(const std::vector<RemoteRange>& runs, RemoteRange all) {
  std::vector<RemoteRange> holes;
  RemotePtr from = all.start;
  const auto add = [&](RemotePtr end) {
    if (from >= end) return;
    if (!holes.empty() && from - holes.back().end() < hole_gap_bytes) {
      holes.back().length = end - holes.back().start;
    } else {
      holes.push_back({from, end - from});
    }
  };
  for (const RemoteRange& run : runs) {
    add(run.start);
    from = run.end();
  }
  add(all.end());
  return holes;
}

// With what lies between runs of small pages that are near to each other.
std::vector<UnitRun> merged(std::vector<UnitRun> runs) {
  const auto is_near = [](const UnitRun& before, const UnitRun& run) {
    const uint64_t gap = before.piece->piece.unit_bytes == page_size ? protect_gap_units : 0;
    return before.piece == run.piece && run.first <= before.end() + gap;
  };
  std::sort(runs.begin(), runs.end(), [](const UnitRun& a, const UnitRun& b) {
    return std::pair(a.piece->piece.first_page, a.first) < std::pair(b.piece->piece.first_page, b.first);
  });
  std::vector<UnitRun> whole;
  for (const UnitRun& run : runs) {
    if (!whole.empty() && is_near(whole.back(), run)) {
      whole.back().count = std::max(whole.back().end(), run.end()) - whole.back().first;
    } else {
      whole.push_back(run);
    }
  }
  return whole;
}

}  // namespace

Status Arming::protect(RemoteRange range) {
  for (;;) {
    const ProtectOutcome outcome = VMSNAP_TRY(state_.uffd.write_protect(range));
    if (outcome == ProtectOutcome::done) return {};
    if (outcome == ProtectOutcome::no_mapping) return tl::unexpected(state_.discarded(range.start));
    VMSNAP_CHECK(state_.status());
  }
}

Status Arming::ahead(const std::function<Status()>& on_step) {
  for (const auto& piece : state_.pieces) {
    if (!armed_ahead(*piece)) continue;
    note_huge(*piece, VMSNAP_TRY(state_.pagemap.huge(piece->piece.range)));
    for (uint64_t done = 0; done < piece->piece.range.length; done += step_bytes) {
      VMSNAP_CHECK(protect({piece->piece.range.start + done,
                            std::min(step_bytes, piece->piece.range.length - done)}));
      end_turn();
      VMSNAP_CHECK(on_step());
      VMSNAP_CHECK(state_.status());
    }
  }
  VMSNAP_CHECK(protect_again());
  for (const auto& piece : state_.pieces) {
    VMSNAP_CHECK(survey(*piece));
    VMSNAP_CHECK(on_step());
  }
  return state_.status();
}

void Arming::note_huge(CapturedPiece& piece, const std::vector<RemoteRange>& runs) {
  if (runs.empty()) return;
  std::lock_guard lock(state_.arming);
  for (const RemoteRange& run : runs) piece.note_huge(piece.unit_of(run.start), run.length / page_size);
}

// Where there is memory, and where there is none. Early writers go on: what
// appears after the first look is in a hole, and holes are looked at again; what
// has appeared before it is protected by the second.
Status Arming::survey(CapturedPiece& piece) {
  const MemoryPiece& memory = piece.piece;
  if (memory.shared()) {
    // Blocks are counted: none may be filled in meanwhile.
    std::unique_lock lock(state_.arming, std::defer_lock);
    if (memory.backing == Backing::hugetlb_shared) lock.lock();
    return set_armed_by_file(state_.process, state_.pagemap, piece);
  }
  if (!armed_ahead(piece)) return {};
  if (memory.private_of_file()) {
    VMSNAP_CHECK(note_owned(piece, memory.range));
    return set_armed_by_file(state_.process, state_.pagemap, piece);
  }
  for (const RemoteRange& run : VMSNAP_TRY(state_.pagemap.unmarked(memory.range))) {
    VMSNAP_CHECK(protect(run));
  }
  // Of one look: what is not armed now is looked at again at the instant, also what
  // was there a moment ago.
  const std::vector<RemoteRange> marked = VMSNAP_TRY(state_.pagemap.marked(memory.range));
  set_armed(piece, marked);
  piece.holes = holes_between(marked, memory.range);
  note_huge(piece, VMSNAP_TRY(state_.pagemap.huge(memory.range)));
  return {};
}

Status Arming::again() {
  size_t before = SIZE_MAX;
  for (int round = 0; round < max_rounds; ++round) {
    const size_t runs = VMSNAP_TRY(protect_again());
    if (runs <= few_runs) break;
    // To protect a page takes longer than to write to it: a writer that only
    // writes would be faster than we are.
    if (runs > before / 2) state_.early_writes_wait = true;
    before = runs;
  }
  return state_.status();
}

// How many runs there were. Whatever is let through from here on is noted anew.
Result<size_t> Arming::protect_again() {
  std::vector<UnitRun> runs;
  {
    std::lock_guard lock(state_.arming);
    runs.swap(state_.let_through);
  }
  const size_t count = runs.size();
  runs = merged(std::move(runs));
  for (size_t done = 0; done < runs.size(); done += step_runs) {
    VMSNAP_CHECK(protect_runs(std::span(runs).subspan(done, std::min(step_runs, runs.size() - done))));
    end_turn();
  }
  return count;
}

Status Arming::protect_runs(std::span<const UnitRun> runs) {
  for (const UnitRun& run : runs) {
    const RemoteRange range = run.piece->units(run.first, run.count);
    VMSNAP_CHECK(protect(range));
    // Absent anonymous pages take no mark and read as zero.
    if (run.piece->piece.private_of_file()) {
      VMSNAP_CHECK(note_owned(*run.piece, range));
    } else if (run.piece->piece.shared()) {
      if (run.piece->piece.file && run.piece->piece.unit_bytes == page_size) {
        set_armed_by_data_in(*run.piece, run);
      }
    } else {
      set_armed(*run.piece, VMSNAP_TRY(state_.pagemap.marked(range)));
    }
  }
  state_.written_early.insert(state_.written_early.end(), runs.begin(), runs.end());
  return {};
}

// After it was protected. Never taken back: what was discarded since fails the
// capture, though it need not.
Status Arming::note_owned(CapturedPiece& piece, RemoteRange range) {
  const std::vector<RemoteRange> runs = VMSNAP_TRY(state_.pagemap.owned(range));
  set_armed(piece, runs);
  for (const RemoteRange& run : runs) {
    const auto [first, end] = piece.touched_by(run);
    for (uint64_t unit = first; unit < end; ++unit) piece.own[unit] = true;
  }
  return {};
}

Status Arming::protect_appeared(CapturedPiece& piece) {
  for (const RemoteRange& hole : piece.holes) {
    for (const RemoteRange& run : VMSNAP_TRY(state_.pagemap.unmarked(hole))) {
      VMSNAP_CHECK(protect(run));
      set_armed(piece, std::vector{run});
    }
  }
  piece.holes.clear();
  return {};
}

// All of it that has the mark: what is absent may be data of the file, or a page that
// is being migrated, which cannot be seen.
Status Arming::arm_private_hugetlb(CapturedPiece& piece) {
  if (piece.piece.file) {
    struct stat about = {};
    if (::fstat(piece.piece.file->get(), &about) < 0) return fail_errno(errno, "cannot look at huge pages");
    piece.expected_blocks = static_cast<uint64_t>(about.st_blocks);
  }
  set_armed(piece, VMSNAP_TRY(state_.pagemap.marked(piece.piece.range)));
  return note_owned(piece, piece.piece.range);
}

Status Arming::at_instant() {
  VMSNAP_CHECK(protect_runs(merged(std::exchange(state_.let_through, {}))));
  const size_t half = state_.pieces.size() / 2;
  for (size_t i = 0; i < state_.pieces.size(); ++i) {
    if (i == half) VMSNAP_TEST_POINT("pause.half_armed");
    CapturedPiece& piece = *state_.pieces[i];
    VMSNAP_CHECK(protect_appeared(piece));
    if (armed_ahead(piece)) continue;
    VMSNAP_CHECK(protect(piece.piece.range));
    if (piece.piece.private_of_file()) VMSNAP_CHECK(arm_private_hugetlb(piece));
  }
  state_.armed = true;
  return {};
}

}  // namespace vmsnap
