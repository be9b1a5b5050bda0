// Which pages of a process are there, and which carry the userfaultfd
// write-protect mark.
//
// PAGEMAP_SCAN where the kernel has it (Linux 6.7), else /proc/PID/pagemap,
// eight bytes a page (Documentation/admin-guide/mm/pagemap.rst). The
// descriptor belongs to the address space, not to the process number: after an
// execve it sees nothing. Safe from several threads.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"
#include "snap/vmm/process.h"
#include "snap/vmm/remote_ptr.h"

namespace vmsnap {

class PageMap {
 public:
  enum class Method { automatic, pagemap_read };  // the latter for tests

  static Result<PageMap> open(const Process& process, Method method = Method::automatic);

  // Runs of pages that are present or swapped out, ascending, merged.
  Result<std::vector<RemoteRange>> populated(RemoteRange range) const;
  // Runs of pages that carry the mark. Swapped-out pages keep it, and so do
  // markers of absent shared pages.
  Result<std::vector<RemoteRange>> marked(RemoteRange range) const;
  // Runs of pages that are present or swapped out and carry no mark.
  Result<std::vector<RemoteRange>> unmarked(RemoteRange range) const;
  // Runs of pages of the process's own: of a private mapping of a file, those that
  // are not the file's. A marker is none. What is being migrated may be missing, if
  // it is of hugetlb. Always by /proc/PID/pagemap.
  Result<std::vector<RemoteRange>> owned(RemoteRange range) const;
  // Runs of pages that are mapped as huge pages (2 MiB). Empty without
  // PAGEMAP_SCAN: /proc/PID/pagemap does not tell.
  Result<std::vector<RemoteRange>> huge(RemoteRange range) const;

 private:
  enum class Want { populated, marked, unmarked, owned, huge };
  Result<std::vector<RemoteRange>> scan(RemoteRange range, Want want) const;
  Result<std::vector<RemoteRange>> scan_by_ioctl(RemoteRange range, Want want) const;
  Result<std::vector<RemoteRange>> scan_by_read(RemoteRange range, Want want) const;

  Fd fd_;
  bool use_ioctl_ = false;
};

}  // namespace vmsnap
