// How many descriptors this process may have.
#pragma once

#include <sys/resource.h>

namespace vmsnap {

// While this lives, as many as the process is allowed to have: for work that needs some
// for each of many VMs or snapshots, where 1024 are the usual limit. Not while other
// programs are started: some cannot bear numbers above 1023 (select(2)).
class MoreDescriptors {
 public:
  MoreDescriptors() {
    raised_ = ::getrlimit(RLIMIT_NOFILE, &before_) == 0 && before_.rlim_cur < before_.rlim_max;
    const rlimit most = {before_.rlim_max, before_.rlim_max};
    if (raised_) raised_ = ::setrlimit(RLIMIT_NOFILE, &most) == 0;
  }
  ~MoreDescriptors() {
    if (raised_) (void)::setrlimit(RLIMIT_NOFILE, &before_);
  }
  MoreDescriptors(const MoreDescriptors&) = delete;
  MoreDescriptors& operator=(const MoreDescriptors&) = delete;

 private:
  rlimit before_ = {};
  bool raised_ = false;
};

}  // namespace vmsnap
