#include "formats/store/pack_set.h"

#include <sys/resource.h>

#include <algorithm>
#include <utility>

#include "formats/damage.h"
#include "formats/image_file.h"

namespace vmsnap {

namespace {

// A share of the descriptors that this process may have: two sets may be in use,
// and much else.
size_t max_open_packs() {
  rlimit limit = {};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) limit.rlim_cur = 1024;
  return std::clamp<rlim_t>(limit.rlim_cur / 4, 8, 4096);
}

}  // namespace

PackSet::PackSet(StorePaths paths, const SecretKey* master)
    : paths_(std::move(paths)), master_(master), max_open_(max_open_packs()) {}

void PackSet::add_rows(const std::vector<layout::PackRow>& rows) {
  std::unique_lock lock(mutex_);
  for (const layout::PackRow& row : rows) {
    packs_.push_back(std::make_unique<Pack>());
    packs_.back()->row = row;
    numbers_.emplace(row.id, packs_.size());
  }
}

Result<uint64_t> PackSet::add_locked(std::unique_ptr<Pack> pack) {
  if (packs_.size() == layout::max_pack_number) {
    return tl::unexpected(
        Error(ErrorCode::refused, "a snapshot cannot refer to more than 65535 packs")
            .with_remedy("'vmsnap prune' puts small packs together."));
  }
  const layout::ImageId id = pack->row.id;
  packs_.push_back(std::move(pack));
  numbers_.emplace(id, packs_.size());
  return packs_.size();
}

Result<uint64_t> PackSet::number_of(const layout::PackRow& row) {
  {
    std::shared_lock lock(mutex_);
    const auto found = numbers_.find(row.id);
    if (found != numbers_.end()) return found->second;
  }
  std::unique_lock lock(mutex_);
  const auto found = numbers_.find(row.id);
  if (found != numbers_.end()) return found->second;
  auto pack = std::make_unique<Pack>();
  pack->row = row;
  return add_locked(std::move(pack));
}

Result<uint64_t> PackSet::add_open(const layout::ImageId& id, int fd, const std::string& name,
                                   const SecretKey* key) {
  auto pack = std::make_unique<Pack>();
  pack->row.id = id;
  pack->row.frames_end = layout::max_pack_bytes;
  pack->fd = fd;
  pack->name = name;
  pack->key = key;
  std::unique_lock lock(mutex_);
  return add_locked(std::move(pack));
}

void PackSet::set_row(uint64_t number, const layout::PackRow& row) {
  std::unique_lock lock(mutex_);
  packs_[number - 1]->row = row;
}

layout::PackRow PackSet::row(uint64_t number) const {
  std::shared_lock lock(mutex_);
  return packs_[number - 1]->row;
}

bool PackSet::being_written(uint64_t number) const {
  std::shared_lock lock(mutex_);
  return packs_[number - 1]->fd >= 0;
}

uint64_t PackSet::size() const {
  std::shared_lock lock(mutex_);
  return packs_.size();
}

Result<layout::ImageId> PackSet::file_id(uint64_t number) const {
  std::shared_lock lock(mutex_);
  if (number == 0 || number > packs_.size()) {
    return damaged(paths_.root, "a page entry refers to pack number {}", number);
  }
  return packs_[number - 1]->row.id;
}

FrameSource PackSet::source_of(const Pack& pack) const {
  if (pack.fd >= 0) {
    return {pack.fd, pack.name, layout::image_seed(pack.row.id), pack.row.frames_end, pack.key};
  }
  FrameSource source = pack.file->frames(pack.row.frames_end);
  source.hold = pack.file;
  return source;
}

Result<FrameSource> PackSet::source(uint64_t number) const {
  {
    std::shared_lock lock(mutex_);
    if (number == 0 || number > packs_.size()) {
      return damaged(paths_.root, "a page entry refers to pack number {}", number);
    }
    const Pack& pack = *packs_[number - 1];
    if (pack.fd >= 0 || pack.file) return source_of(pack);
  }
  std::unique_lock lock(mutex_);
  const Pack& pack = *packs_[number - 1];
  if (!pack.file) VMSNAP_CHECK(open_locked(number));
  return source_of(pack);
}

Status PackSet::open_locked(uint64_t number) const {
  while (open_.size() >= max_open_) {
    packs_[open_.front() - 1]->file.reset();  // who reads it now holds it still
    open_.pop_front();
  }
  std::shared_ptr<PackFile> file = VMSNAP_TRY(open_pack(paths_, packs_[number - 1]->row.id, master_));
  if (file->sealed() && !master_) {
    return fail(ErrorCode::wrong_key, "{} is sealed, and no key was given", file->path());
  }
  packs_[number - 1]->file = std::move(file);
  open_.push_back(number);
  return {};
}

}  // namespace vmsnap
