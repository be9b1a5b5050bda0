#include "restore/privileges.h"

#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

namespace vmsnap {

namespace {

bool is_ours(const std::string& file) {
  struct stat about = {};
  return ::stat(file.c_str(), &about) == 0 && about.st_uid == ::geteuid();
}

// The bounding set can only be changed with CAP_SETPCAP; without it there is
// nothing that no_new_privs does not prevent.
Status empty_bounding_set(uint64_t kept) {
  for (unsigned capability = 0; ::prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; ++capability) {
    if (kept >> capability & 1) continue;
    if (::prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 && errno != EPERM) {
      return fail_errno(errno, "cannot drop capability {}", capability);
    }
  }
  return {};
}

}  // namespace

Status drop_privileges(const std::vector<std::string>& read,
                       const std::vector<std::string>& written) {
  uint64_t kept = 0;
  if (!std::ranges::all_of(read, is_ours)) kept |= uint64_t{1} << CAP_DAC_READ_SEARCH;
  if (!std::ranges::all_of(written, is_ours)) kept |= uint64_t{1} << CAP_DAC_OVERRIDE;
  VMSNAP_CHECK(empty_bounding_set(kept));
  // There are no ambient capabilities before Linux 4.3.
  if (::prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 && errno != EINVAL) {
    return fail_errno(errno, "cannot drop the ambient capabilities");
  }
  __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  std::array<__user_cap_data_struct, 2> sets = {};
  if (::syscall(SYS_capget, &header, sets.data()) < 0) {
    return fail_errno(errno, "cannot read the capabilities");
  }
  for (unsigned i = 0; i < sets.size(); ++i) {
    const auto mask = static_cast<uint32_t>(kept >> 32 * i);
    sets[i] = {.effective = sets[i].effective & mask,
               .permitted = sets[i].permitted & mask,
               .inheritable = 0};
  }
  if (::syscall(SYS_capset, &header, sets.data()) < 0) {
    return fail_errno(errno, "cannot drop the capabilities");
  }
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) {
    return fail_errno(errno, "cannot set no_new_privs");
  }
  return {};
}

}  // namespace vmsnap
