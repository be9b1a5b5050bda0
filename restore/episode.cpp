#include "restore/episode.h"

#include "formats/log.h"

namespace vmsnap {

void log_delay(Episode& delay, std::string_view whose, const Error& why) {
  if (!delay.begins()) return;
  log_line(LogLevel::error,
           fmt::format("{}: pages cannot be read at the moment: {}. Nothing is lost: what touches "
                       "them waits, and goes on when this is put right.",
                       whose, why.message()));
}

}  // namespace vmsnap
