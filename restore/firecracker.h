// The handshake of a VMM that wants its memory served: one JSON array over a
// Unix stream socket, in any number of pieces, with one userfaultfd beside it
// (SCM_RIGHTS). Nothing is answered.
//
//   [{"base_host_virt_addr": 140000000000000, "size": 1073741824, "offset": 0,
//     "page_size": 4096, "page_size_kib": 4096}, ...]
//
// base_host_virt_addr and size are the region in the VMM, offset is where its
// content begins in the image's raw export (the pages of all regions one after
// the other). Other members are ignored.
//
// "page_size_kib" is what older versions send alone. In spite of its name
// Firecracker put bytes there; it is also read as KiB where only that makes
// sense (4, 2048). Both page sizes of x86 are far apart, so no value has two
// readings. With neither member, pages have 4 KiB (before huge pages were known).
// When both are there they must agree.
//
// Whoever connects is not trusted: every number is checked before it is used,
// and a bad one harms nobody but its sender, for a userfaultfd reaches only the
// memory of who made it.
//
// Source: Firecracker's documentation of snapshot page-fault handling and the
// messages of its versions 1.1 to 1.13.
#pragma once

#include <chrono>
#include <string_view>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "restore/page_source.h"

namespace vmsnap {

inline constexpr size_t handshake_max_bytes = 256 << 10;
inline constexpr size_t handshake_max_regions = 1024;

// Finds where a JSON array that comes in pieces ends.
class ArrayScanner {
 public:
  enum class State { incomplete, complete, not_an_array };
  State add(std::string_view piece);
  // After `complete`: whether anything but white space followed.
  bool followed() const { return followed_; }

 private:
  int depth_ = 0;
  bool begun_ = false, done_ = false, in_string_ = false, escaped_ = false, followed_ = false;
};

// The regions of a whole message, checked: units of 4 KiB or 2 MiB, aligned, not
// empty, within the image, apart from one another in memory and in the image.
// ErrorCode::usage says which region and why.
Result<std::vector<ServedRange>> parse_handshake(std::string_view message, uint64_t image_pages);

struct Handshake {
  Fd uffd;
  std::vector<ServedRange> ranges;
};

// Receives one on a connected socket. Blocks until it is whole, at most `limit`;
// ErrorCode::interrupted after a signal to us. Whatever else was sent along, or
// all of it when the handshake is bad, is closed.
Result<Handshake> receive_handshake(int socket, uint64_t image_pages,
                                    std::chrono::milliseconds limit = std::chrono::seconds(10));

}  // namespace vmsnap
