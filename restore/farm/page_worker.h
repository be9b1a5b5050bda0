// The page server process of a farm: FarmServer in a child of the keeper's.
#pragma once

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

// In the keeper: hands over a clone. Blocks until it is served.
Status tell_page_worker(int link, const KeptClone& clone);

}  // namespace vmsnap
