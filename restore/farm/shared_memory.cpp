#include "restore/farm/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

#include "formats/image_reader.h"
#include "snap/vmm/memory_map.h"

namespace vmsnap {

Result<SharedMemory> SharedMemory::create(uint64_t pages) {
  Fd fd(::memfd_create(clone_memory_name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return fail_errno(errno, "cannot make a file in memory");
  // Nobody opens it anew for writing but root; nobody changes its size.
  if (::ftruncate(fd.get(), static_cast<off_t>(pages * page_size)) < 0 ||
      ::fchmod(fd.get(), 0400) < 0 ||
      ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
    return fail_errno(errno, "cannot prepare a file in memory of {} bytes", pages * page_size);
  }
  return SharedMemory(std::move(fd), pages);
}

Result<SharedMemory> SharedMemory::of_clone(const Process& clone, uint64_t pages) {
  for (const Mapping& mapping : VMSNAP_TRY(read_memory_map_quick(clone))) {
    if (!mapping.of_clone()) continue;
    Fd fd = VMSNAP_TRY(open_mapped_file(clone, mapping, O_RDWR));
    struct stat about = {};
    if (::fstat(fd.get(), &about) < 0) return fail_errno(errno, "cannot look at shared memory");
    if (static_cast<uint64_t>(about.st_size) != pages * page_size) {
      return fail(ErrorCode::damaged, "the shared memory of {} has {} bytes, the image {}",
                  clone.describe(), about.st_size, pages * page_size);
    }
    return SharedMemory(std::move(fd), pages);
  }
  return fail(ErrorCode::damaged, "{} has no memory that clones share", clone.describe());
}

Result<Fd> SharedMemory::open_for_clone() const {
  return open_file(fmt::format("/proc/self/fd/{}", fd_.get()), O_RDONLY);
}

Result<CloneMemory> clone_memory(const Process& clone) {
  CloneMemory sum;
  for (const Mapping& mapping : VMSNAP_TRY(read_memory_map(clone))) {
    if (!mapping.of_clone()) continue;
    sum.mapped += mapping.range.length;
    sum.shared += mapping.resident - std::min(mapping.resident, mapping.anonymous);
    sum.proportional += mapping.proportional;
    sum.own += mapping.anonymous;
  }
  return sum;
}

}  // namespace vmsnap
