#include "restore/episode.h"

#include "formats/log.h"

namespace vmsnap {

std::string delay_text(std::string_view whose, const Error& why) {
  return fmt::format("{}: pages cannot be read at the moment: {}. Nothing is lost: what touches "
                     "them waits, and goes on when this is put right.",
                     whose, why.message());
}

void log_delay(Episode& delay, std::string_view whose, const Error& why) {
  if (delay.begins()) log_line(LogLevel::error, delay_text(whose, why));
}

}  // namespace vmsnap
