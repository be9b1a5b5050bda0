// A snapshot of a VM that is itself being restored lazily needs all of its
// pages, and whoever serves them may have been told to bring only what is
// touched. So the page server can be asked for the rest.
//
// It listens at an abstract Unix socket (unix(7)) that is named after the VM's
// process, so that nothing stays of it when it ends; both ends must be in one
// network and one PID namespace. It listens to root and to its own user.
#pragma once

#include "formats/error.h"
#include "formats/file.h"
#include "snap/vmm/process.h"

namespace vmsnap {

enum class FillAnswer : char {
  nobody = 0,     // there is no page server, or it does not answer
  comes = 'c',    // it brings all pages, and ends then
  parked = 'p',   // it serves a parked VM, and goes on doing so
};

// Blocks for two seconds at most.
FillAnswer ask_for_fill(const Process& vm);

class FillRequests {
 public:
  static Result<FillRequests> listen(const Process& vm);

  int fd() const { return listener_.get(); }  // readable when somebody asks
  // Answers those who have asked since; whether there were any. Does not block.
  bool answer(FillAnswer answer);

 private:
  Fd listener_;
};

}  // namespace vmsnap
