// The page server process of a farm: FarmServer in a child of the keeper's.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "formats/image_reader.h"
#include "restore/farm/farm_dir.h"
#include "restore/farm/shared_memory.h"
#include "restore/page_source.h"
#include "snap/vmm/process.h"
#include "snap/vmm/uffd.h"

namespace vmsnap {

// What the keeper keeps of a clone.
struct KeptClone {
  std::string name;
  Process process;
  Uffd uffd;
  std::vector<ServedRange> ranges;
};

struct PageWorkerSetup {
  std::string run_dir;
  const FarmRecord& record;
  const ImageReader& image;
  const SharedMemory& memory;
};

// In the child: gives up its privileges and serves `clones`, and those that
// come over `link`, until the keeper closes it. Returns an exit status.
int run_page_worker(const PageWorkerSetup& setup, std::vector<KeptClone> clones, int link);

// The keeper's side of the link. After an error of either the page server is
// dead or too slow, and its answer may still come: an older one is skipped.
class PageWorkerLink {
 public:
  PageWorkerLink() = default;
  explicit PageWorkerLink(Fd fd) : fd_(std::move(fd)) {}
  explicit operator bool() const { return static_cast<bool>(fd_); }
  int fd() const { return fd_.get(); }

  // Hands over a clone. Blocks until it is served, at most ten seconds.
  Status add(const KeptClone& clone);
  // Its counters; at most three seconds.
  Result<nlohmann::json> status();

 private:
  Result<nlohmann::json> ask(nlohmann::json request, const std::vector<int>& descriptors,
                             std::chrono::milliseconds limit);

  Fd fd_;
  uint64_t number_ = 0;  // of the last request
};

}  // namespace vmsnap
