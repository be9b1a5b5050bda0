// Every kind of damage that a store can have: what verify says of it, and that
// nobody ever gets wrong bytes.
#include <algorithm>
#include <functional>
#include <iterator>

#include "formats/image_file.h"
#include "formats/page_entry.h"
#include "formats/store/store_repair.h"
#include "formats/store/store_verify.h"
#include "tests/formats/image_forge.h"
#include "tests/store/pack_forge.h"
#include "tests/store/test_store.h"

namespace vmsnap {
namespace {

// The files of a store with one snapshot in one pack, and of another store.
struct DamageSite {
  std::string pack;
  std::string manifest;
  std::string other_pack;
  std::string other_manifest;
  std::string index;
  std::string quarantine;

  static void change(const std::string& path,
                     const std::function<void(std::vector<std::byte>&)>& how) {
    auto bytes = read_file(path);
    how(bytes);
    write_file(path, bytes);
  }
  static void flip(const std::string& path, uint64_t offset) {
    change(path, [&](auto& bytes) { bytes.at(offset) ^= std::byte{1}; });
  }
  layout::PackTrailer trailer() const {
    auto bytes = read_file(pack);
    return PackForge(bytes).get<layout::PackTrailer>(bytes.size() - layout::block_size);
  }
  layout::Trailer manifest_trailer() const {
    auto bytes = read_file(manifest);
    return ImageForge(bytes).get<layout::Trailer>(bytes.size() - layout::block_size);
  }
};

enum class Says {
  nothing,        // it is no damage
  pack,           // the pack is damaged, and the snapshot has lost no page
  lost_pages,     // the pack is damaged, and some pages are lost
  missing,        // the pack is nowhere
  unreadable,     // the manifest is
  snapshot_only,  // the manifest is damaged, but opens
};

struct Damage {
  const char* name;
  Says says;
  uint64_t lost;  // pages, in a store that is not sealed
  std::function<void(const DamageSite&)> make;
  bool plain_only = false;  // it changes what can be found only in a file that is not sealed
};

void PrintTo(const Damage& damage, std::ostream* out) { *out << damage.name; }

constexpr size_t pages_of_each = 40;
// Where the frames of random pages are in a pack.
constexpr uint64_t random_frame = 16 + page_size;

const Damage all_damages[] = {
    {"nothing", Says::nothing, 0, [](const DamageSite&) {}},

    {"pack_header_magic", Says::lost_pages, pages_of_each,
     [](const DamageSite& s) { s.flip(s.pack, 0); }},
    {"pack_header_id", Says::lost_pages, pages_of_each,
     [](const DamageSite& s) { s.flip(s.pack, 16); }},
    {"pack_header_reserved", Says::lost_pages, pages_of_each,
     [](const DamageSite& s) { s.flip(s.pack, 3000); }},
    {"pack_frame_length", Says::lost_pages, 1,
     [](const DamageSite& s) { s.flip(s.pack, layout::frames_begin + 4); }},
    {"pack_frame_codec", Says::lost_pages, 1,
     [](const DamageSite& s) { s.flip(s.pack, layout::frames_begin); }},
    {"pack_frame_checksum", Says::lost_pages, 1,
     [](const DamageSite& s) { s.flip(s.pack, layout::frames_begin + 8); }},
    {"pack_frame_payload", Says::lost_pages, 1,
     [](const DamageSite& s) { s.flip(s.pack, layout::frames_begin + 200); }},
    {"pack_frames_swapped", Says::lost_pages, 2,
     [](const DamageSite& s) {
       s.change(s.pack, [](auto& bytes) {
         const auto first = bytes.begin() + layout::frames_begin;
         std::swap_ranges(first, first + random_frame, first + random_frame);
       });
     },
     true},
    {"pack_frames_zeroed", Says::lost_pages, 3,
     [](const DamageSite& s) {
       s.change(s.pack, [](auto& bytes) {
         std::fill_n(bytes.begin() + layout::frames_begin + 100, 2 * random_frame, std::byte{0});
       });
     },
     true},
    {"pack_end_mark", Says::pack, 0,
     [](const DamageSite& s) { s.flip(s.pack, s.trailer().frames_end - 3); }},
    {"pack_segment_offset", Says::pack, 0,
     [](const DamageSite& s) { s.flip(s.pack, s.trailer().segments_offset); }},
    {"pack_segment_digest", Says::pack, 0,
     [](const DamageSite& s) { s.flip(s.pack, s.trailer().segments_offset + 20); }},
    {"pack_frame_table", Says::pack, 0,
     [](const DamageSite& s) { s.flip(s.pack, s.trailer().table_offset + 17); }},
    {"pack_padding", Says::pack, 0,
     [](const DamageSite& s) {
       s.flip(s.pack, std::filesystem::file_size(s.pack) - layout::block_size - 1);
     }},
    {"pack_trailer_magic", Says::pack, 0,
     [](const DamageSite& s) {
       s.flip(s.pack, std::filesystem::file_size(s.pack) - layout::block_size);
     }},
    {"pack_trailer_reserved", Says::pack, 0,
     [](const DamageSite& s) { s.flip(s.pack, std::filesystem::file_size(s.pack) - 100); }},
    {"pack_trailer_checksum", Says::pack, 0,
     [](const DamageSite& s) { s.flip(s.pack, std::filesystem::file_size(s.pack) - 1); }},
    {"pack_without_trailer", Says::pack, 0,
     [](const DamageSite& s) {
       std::filesystem::resize_file(s.pack,
                                    std::filesystem::file_size(s.pack) - layout::block_size);
     }},
    {"pack_cut_in_its_frames", Says::lost_pages, pages_of_each - 30,
     [](const DamageSite& s) {
       std::filesystem::resize_file(s.pack, layout::frames_begin + 30 * random_frame);
     },
     true},
    {"pack_empty", Says::lost_pages, pages_of_each,
     [](const DamageSite& s) { std::filesystem::resize_file(s.pack, 0); }},
    {"pack_longer", Says::pack, 0,
     [](const DamageSite& s) {
       std::filesystem::resize_file(s.pack, std::filesystem::file_size(s.pack) + 4096);
     }},
    {"pack_missing", Says::missing, pages_of_each,
     [](const DamageSite& s) { std::filesystem::remove(s.pack); }},
    {"pack_in_quarantine", Says::nothing, 0,
     [](const DamageSite& s) {
       const std::filesystem::path pack = s.pack;
       std::filesystem::rename(pack, s.quarantine + "/" + pack.filename().string());
     }},
    {"pack_of_another_store", Says::lost_pages, pages_of_each,
     [](const DamageSite& s) { write_file(s.pack, read_file(s.other_pack)); }},
    // Right in all its checksums, and under the right id.
    {"pack_forged", Says::lost_pages, pages_of_each,
     [](const DamageSite& s) {
       s.change(s.pack, [](auto& bytes) {
         bytes[bytes.size() - layout::block_size - 1] = std::byte{1};
         PackForge(bytes).mend();
       });
     },
     true},
    {"pack_is_a_directory", Says::lost_pages, pages_of_each,
     [](const DamageSite& s) {
       std::filesystem::remove(s.pack);
       std::filesystem::create_directory(s.pack);
     }},

    {"manifest_header", Says::unreadable, 0, [](const DamageSite& s) { s.flip(s.manifest, 9); }},
    {"manifest_trailer", Says::unreadable, 0,
     [](const DamageSite& s) {
       s.flip(s.manifest, std::filesystem::file_size(s.manifest) - 100);
     }},
    {"manifest_cut", Says::unreadable, 0,
     [](const DamageSite& s) {
       std::filesystem::resize_file(s.manifest,
                                    std::filesystem::file_size(s.manifest) - layout::block_size);
     }},
    {"manifest_empty", Says::unreadable, 0,
     [](const DamageSite& s) { std::filesystem::resize_file(s.manifest, 0); }},
    {"manifest_of_another_store", Says::unreadable, 0,
     [](const DamageSite& s) { write_file(s.manifest, read_file(s.other_manifest)); }},
    {"manifest_tree", Says::snapshot_only, pages_of_each,
     [](const DamageSite& s) { s.flip(s.manifest, s.manifest_trailer().root.offset + 11); },
     true},
    {"manifest_packs", Says::unreadable, 0,
     [](const DamageSite& s) {
       for (const layout::Section& section : s.manifest_trailer().sections) {
         if (section.type == static_cast<uint32_t>(layout::SectionType::packs)) {
           s.flip(s.manifest, section.offset + 1);
         }
       }
     },
     true},
    {"manifest_device_state", Says::snapshot_only, 0,
     [](const DamageSite& s) {
       for (const layout::Section& section : s.manifest_trailer().sections) {
         if (section.type == static_cast<uint32_t>(layout::SectionType::device_state)) {
           s.flip(s.manifest, section.offset + 1);
         }
       }
     },
     true},
    {"manifest_end_mark", Says::snapshot_only, 0,
     [](const DamageSite& s) { s.flip(s.manifest, layout::frames_begin + 1); },
     true},
    // The checksums are right, so only verify can tell.
    {"manifest_entry_between_frames", Says::snapshot_only, 1,
     [](const DamageSite& s) {
       s.change(s.manifest, [&](auto& bytes) {
         ImageForge forge(bytes);
         const uint64_t at = s.manifest_trailer().root.offset;
         forge.put(at, forge.template get<uint64_t>(at) + 1);
         forge.mend();
       });
     },
     true},
    {"manifest_entry_of_no_pack", Says::snapshot_only, 1,
     [](const DamageSite& s) {
       s.change(s.manifest, [&](auto& bytes) {
         ImageForge forge(bytes);
         const uint64_t at = s.manifest_trailer().root.offset;
         forge.put(at, forge.template get<uint64_t>(at) | uint64_t{7} << 40);
         forge.mend();
       });
     },
     true},

    {"index_missing", Says::nothing, 0,
     [](const DamageSite& s) {
       for (const auto& entry : std::filesystem::directory_iterator(s.index)) {
         std::filesystem::remove(entry.path());
       }
     }},
    {"index_garbage", Says::nothing, 0,
     [](const DamageSite& s) {
       for (const auto& entry : std::filesystem::directory_iterator(s.index)) {
         s.change(entry.path(), [](auto& bytes) {
           for (size_t i = 0; i < bytes.size(); i += 5) bytes[i] ^= std::byte{0x55};
         });
       }
     }},
};

class ADamagedStore : public StoreTest, public testing::WithParamInterface<Damage> {
 protected:
  void try_damage();

  // Right bytes or ErrorCode::damaged; how many of the latter.
  static uint64_t read_pages(const Store& store, const std::string& id,
                             const std::vector<PageBytes>& pages) {
    const auto reader = store.open_snapshot(id);
    if (!reader) {
      EXPECT_EQ(reader.error().code(), ErrorCode::damaged) << reader.error().message();
      return pages.size();
    }
    uint64_t lost = 0;
    for (size_t i = 0; i < pages.size(); ++i) {
      PageBytes page;
      const auto read = (*reader)->read_page(i, page);
      if (read) {
        EXPECT_EQ(page, pages[i]) << "page " << i;
      } else {
        EXPECT_EQ(read.error().code(), ErrorCode::damaged) << read.error().message();
        ++lost;
      }
    }
    const auto state = (*reader)->device_state();
    if (state) {
      EXPECT_EQ(*state, some_state(1000));
    }
    return lost;
  }
};

void ADamagedStore::try_damage() {
  const Damage& damage = GetParam();
  std::vector<PageBytes> pages;
  for (uint64_t i = 0; i < pages_of_each; ++i) pages.push_back(random_page(i));
  const auto first_in = [](const std::string& directory) {
    return std::filesystem::directory_iterator(directory)->path().string();
  };

  DamageSite site;
  {
    const std::string here = std::exchange(options_.directory, directory_.file("other"));
    const auto other = open();
    const Written written = write(*other, texts(0, pages_of_each));
    site.other_pack = first_in(other->paths().packs());
    site.other_manifest = other->paths().snapshot(written.id);
    options_.directory = here;
  }
  std::string id;
  {
    const auto store = open();
    id = write(*store, pages).id;
    const StorePaths& paths = store->paths();
    site.pack = first_in(paths.packs());
    site.manifest = paths.snapshot(id);
    site.index = paths.index();
    site.quarantine = paths.quarantine();
  }
  damage.make(site);

  const auto store = open();
  const uint64_t lost = read_pages(*store, id, pages);
  const StoreVerifyReport report = verify_store(*store, {}).value();
  const uint64_t said = report.damaged_snapshots.empty()
                            ? 0
                            : report.damaged_snapshots[0].report.damaged_pages;
  EXPECT_EQ(report.status().has_value(), damage.says == Says::nothing);
  EXPECT_EQ(report.damaged_packs.size(),
            damage.says == Says::pack || damage.says == Says::lost_pages ? 1u : 0u);
  EXPECT_EQ(report.missing_packs.size(), damage.says == Says::missing ? 1u : 0u);
  EXPECT_EQ(report.unreadable.size(), damage.says == Says::unreadable ? 1u : 0u);
  EXPECT_EQ(report.damaged_snapshots.size(), damage.says == Says::lost_pages ||
                                                     damage.says == Says::missing ||
                                                     damage.says == Says::snapshot_only
                                                 ? 1u
                                                 : 0u);
  EXPECT_EQ(said, damage.lost);
  // Verify may know better than a reader, but never less.
  if (damage.says != Says::unreadable) {
    EXPECT_LE(lost, said);
  }

  // Whatever it was: after a repair, a new snapshot is whole.
  const auto repaired = repair_store(*store, {});
  ASSERT_TRUE(repaired) << repaired.error().message();
  const Written healed = write(*store, pages);
  expect_pages(*store, healed.id, pages);
  const StoreVerifyReport after = verify_store(*store, {.snapshots = {healed.id}}).value();
  EXPECT_TRUE(after.ok()) << after.status().error().message();
  EXPECT_FALSE(verify_store(*store, {}).value().repairable);
}

TEST_P(ADamagedStore, IsFoundOutAndNeverReadWrong) { try_damage(); }

class ADamagedSealedStore : public ADamagedStore {};

TEST_P(ADamagedSealedStore, IsFoundOutAndNeverReadWrong) {
  seal_store();
  try_damage();
}

std::vector<Damage> damages_of_sealed() {
  std::vector<Damage> damages;
  std::ranges::copy_if(all_damages, std::back_inserter(damages), std::not_fn(&Damage::plain_only));
  return damages;
}

std::string damage_name(const testing::TestParamInfo<Damage>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(By, ADamagedStore, testing::ValuesIn(all_damages), damage_name);
INSTANTIATE_TEST_SUITE_P(By, ADamagedSealedStore, testing::ValuesIn(damages_of_sealed()),
                         damage_name);

// Whole, and of the same store, but not the snapshot that its name says.
TEST_F(StoreTest, ASnapshotIsTheOneThatWasAskedFor) {
  const auto store = open();
  const Written a = write(*store, texts(0, 10), {.vm = "a"});
  const Written b = write(*store, texts(50, 10), {.vm = "b"});
  write_file(store->paths().snapshot(a.id), read_file(store->paths().snapshot(b.id)));
  EXPECT_EQ(store->open_snapshot(a.id).error().code(), ErrorCode::damaged);
  const StoreVerifyReport report = verify_store(*store, {}).value();
  ASSERT_EQ(report.unreadable.size(), 1u);
  EXPECT_EQ(report.unreadable[0].id, a.id);
  EXPECT_EQ(repair_store(*store, {}).value().quarantined_manifests,
            std::vector<std::string>{a.id});
  expect_pages(*store, b.id, texts(50, 10));
}

// A whole pack of the right id, of somebody without the key.
TEST_F(StoreTest, ASealedOneTakesNoPackThatIsNot) {
  seal_store();
  const auto store = open();
  const Written old = write(*store, texts(0, 10));
  const std::string pack =
      std::filesystem::directory_iterator(store->paths().packs())->path().string();
  options_ = {.directory = directory_.file("plain"), .key = {}};
  const auto plain = open();
  write(*plain, texts(100, 10));
  const auto forged_from = std::filesystem::directory_iterator(plain->paths().packs())->path();
  auto bytes = read_file(forged_from);
  const auto real = read_file(pack);
  constexpr size_t id_at = offsetof(layout::PackHeader, id);
  std::copy_n(real.begin() + id_at, sizeof(layout::ImageId), bytes.begin() + id_at);
  PackForge(bytes).mend(/*also_lengths=*/true);
  write_file(pack, bytes);

  PageBytes page;
  const auto read = store->open_snapshot(old.id).value()->read_page(0, page);
  ASSERT_FALSE(read);
  EXPECT_EQ(read.error().code(), ErrorCode::damaged);
  EXPECT_EQ(verify_store(*store, {}).value().damaged_packs.size(), 1u);
}

}  // namespace
}  // namespace vmsnap
