#include "restore/privileges.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>

namespace vmsnap {

namespace {

// The capabilities of the calling thread.
class Capabilities {
 public:
  static constexpr uint64_t all = ~uint64_t{0};

  static Result<Capabilities> read() {
    Capabilities it;
    if (::syscall(SYS_capget, &it.header_, it.sets_.data()) == 0) return it;
    return fail_errno(errno, "cannot read the capabilities");
  }

  // Of those that were read, with these masks.
  Status set(uint64_t effective, uint64_t permitted, uint64_t inheritable) {
    std::array<__user_cap_data_struct, 2> sets = sets_;
    for (unsigned i = 0; i < sets.size(); ++i) {
      sets[i].effective &= static_cast<uint32_t>(effective >> 32 * i);
      sets[i].permitted &= static_cast<uint32_t>(permitted >> 32 * i);
      sets[i].inheritable &= static_cast<uint32_t>(inheritable >> 32 * i);
    }
    if (::syscall(SYS_capset, &header_, sets.data()) == 0) return {};
    return fail_errno(errno, "cannot drop the capabilities");
  }

 private:
  __user_cap_header_struct header_ = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  std::array<__user_cap_data_struct, 2> sets_ = {};
};

// Called without capabilities: the directories above it must let us through,
// too. What is in a directory of ours is taken for ours.
bool is_ours(const std::string& path, int access) {
  struct stat about = {};
  if (::stat(path.c_str(), &about) < 0) return errno == ENOENT && access == R_OK;
  if (S_ISDIR(about.st_mode)) access |= X_OK;
  return about.st_uid == ::geteuid() &&
         ::faccessat(AT_FDCWD, path.c_str(), access, AT_EACCESS) == 0;
}

// Tried, because whether a path leads to a file is what only the kernel knows.
Result<uint64_t> needed(Capabilities& capabilities, const std::vector<std::string>& read,
                        const std::vector<std::string>& written) {
  VMSNAP_CHECK(capabilities.set(0, Capabilities::all, Capabilities::all));
  uint64_t kept = 0;
  for (const std::string& path : read) {
    if (!is_ours(path, R_OK)) kept |= uint64_t{1} << CAP_DAC_READ_SEARCH;
  }
  for (const std::string& path : written) {
    if (!is_ours(path, R_OK | W_OK)) kept |= uint64_t{1} << CAP_DAC_OVERRIDE;
  }
  VMSNAP_CHECK(capabilities.set(Capabilities::all, Capabilities::all, Capabilities::all));
  return kept;
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
  Capabilities capabilities = VMSNAP_TRY(Capabilities::read());
  const uint64_t kept = VMSNAP_TRY(needed(capabilities, read, written));
  VMSNAP_CHECK(empty_bounding_set(kept));
  // There are no ambient capabilities before Linux 4.3.
  if (::prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 && errno != EINVAL) {
    return fail_errno(errno, "cannot drop the ambient capabilities");
  }
  VMSNAP_CHECK(capabilities.set(kept, kept, 0));
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) {
    return fail_errno(errno, "cannot set no_new_privs");
  }
  return {};
}

}  // namespace vmsnap
