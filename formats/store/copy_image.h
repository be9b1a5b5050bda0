// From one kind of image to the other: a snapshot of a store as an image file,
// an image file as a snapshot.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/image_reader.h"
#include "formats/store/store.h"

namespace vmsnap {

// All of them decode every page and store it anew, with an id of its own. They
// block on the disk, and end with ErrorCode::interrupted if a signal asks so.

// The file appears whole or not at all. Returns its bytes. `deltas` here and
// below: as in ImageWriterOptions.
Result<uint64_t> copy_image(const ImageReader& image, const std::string& path, bool replace,
                            bool deltas);

// Through an unnamed file in $TMPDIR (or /var/tmp), which has room for it.
Status copy_image_to_pipe(const ImageReader& image, int fd, bool deltas);

struct Imported {
  std::string id;
  uint64_t added_bytes = 0;
};
Result<Imported> import_image(const Store& store, const ImageReader& image,
                              const std::string& domain, const std::vector<std::string>& tags,
                              bool deltas);

// The image whose bytes come from `fd`, by way of an unnamed file in the store.
// If the store is sealed, so is that, with a key that nobody else has and that
// goes with the reader.
Result<std::unique_ptr<ImageReader>> open_spooled(int fd, const Store& store);

}  // namespace vmsnap
