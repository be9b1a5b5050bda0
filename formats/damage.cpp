#include "formats/damage.h"

#include <cerrno>

namespace vmsnap {

bool says_damage(const Error& error) {
  if (error.code() == ErrorCode::damaged) return true;
  switch (error.os_errno()) {
    case EIO:
    case EBADMSG:  // some file systems: a checksum of theirs
    case EUCLEAN:
    case ENODATA:
    case EILSEQ: return true;
    default: return false;
  }
}

bool is_lasting(const Error& error) {
  return says_damage(error) || error.code() == ErrorCode::wrong_key;
}

}  // namespace vmsnap
