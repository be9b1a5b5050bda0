// Sizes as people write them.
#pragma once

#include <cstdint>
#include <string_view>

#include "formats/error.h"

namespace vmsnap {

// "512", "64M", "1.5G": bytes, or with K, M, G or T multiples of 1024 (as QEMU
// and restic have it; "KiB" and "MiB" do too). More than 0, at most 2^60.
Result<uint64_t> parse_size(std::string_view text);

}  // namespace vmsnap
