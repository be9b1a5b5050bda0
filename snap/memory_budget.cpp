#include "snap/memory_budget.h"

#include <algorithm>

#include "formats/image_info.h"
#include "formats/text.h"

namespace vmsnap {

namespace {

constexpr uint64_t mib = 1 << 20;
// Measured: the program itself, and the table of duplicate hints.
constexpr uint64_t fixed_bytes = 24 * mib + 16 * mib;
constexpr uint64_t deltas_bytes = 16 * mib;  // the table of similar pages
constexpr uint64_t worker_bytes = 5 * mib;  // a chunk, frames, zstd's state
constexpr uint64_t bytes_per_page = 9;      // its state, and its place in the image
constexpr uint64_t least_staging = 8 * mib;
constexpr uint64_t most_staging = 64 * mib;

}  // namespace

Result<uint64_t> staging_within(std::optional<uint64_t> limit, const MemoryNeeds& needs) {
  const uint64_t taken = fixed_bytes + (needs.deltas ? deltas_bytes : 0) +
                         needs.workers * worker_bytes + needs.pages * bytes_per_page;
  const uint64_t least = taken + least_staging;
  // A default is no reason to refuse a large VM.
  const uint64_t allowed =
      limit ? *limit : std::max(256 * mib + needs.pages * page_size / 1000, least);
  if (allowed < least) {
    return tl::unexpected(
        Error(ErrorCode::usage, fmt::format("{} of memory are too little for a VM of {}",
                                            human_bytes(allowed), human_bytes(needs.pages * page_size)))
            .with_remedy(fmt::format("Give --memory {}M or more, or fewer --cpus.", least / mib + 1)));
  }
  return std::min(allowed - taken, most_staging);
}

}  // namespace vmsnap
