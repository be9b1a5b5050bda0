// The process behind a farm of clones: it keeps what a page server must not
// lose, and starts the page server anew whenever that dies.
//
//   keeper        one thread; holds the shared memory, the image, the clones'
//                 userfaultfds and the directory's lock; listens on farm.sock;
//                 collects nothing from anybody but the run directories
//   page server   its child, without privileges: reads the image, answers
//                 faults (farm_server.h); gets all it needs by the fork, and
//                 new clones by a message
//
// A page server that dies costs the clones that wait a few milliseconds. If the
// keeper is killed its page server goes, too, and the clones wait, because each
// VMM holds its userfaultfd; `restore --reattach` begins with a new keeper.
//
// Requests on farm.sock (farm_link.h); the answer is {} where nothing is said:
//   {"do": "hello"}               "clones", whom it serves: it is at work, and its record is written
//   {"do": "memory"}              {} and the shared memory, for reading only
//   {"do": "join", "clone": "3"}  the clone of that directory is served from now on
//   {"do": "status"}              counters, see FarmServer::status()
//
// The keeper ends, and the memory with it, when no clone lives and nobody is
// connected: who starts clones stays connected meanwhile.
#pragma once

#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/image_reader.h"
#include "restore/farm/farm_dir.h"
#include "restore/farm/shared_memory.h"

namespace vmsnap {

struct FarmSetup {
  FarmDir dir;
  Fd lock;
  FarmRecord record;
  const ImageReader& image;  // the keeper has it by the fork
  SharedMemory memory;
};

// Starts a keeper in the background and returns a connection to it. `clones`
// are served from the start. Must be called while the process has one thread.
Result<Fd> start_keeper(FarmSetup setup, const std::vector<std::string>& clones);

}  // namespace vmsnap
