// Named moments at which a test may make this process die or stand still.
//
// VMSNAP_KILL_AT=name makes the process kill itself with SIGKILL when it gets
// there; VMSNAP_STOP_AT=name stops it with SIGSTOP, once, until SIGCONT, and
// VMSNAP_STOP_AT=name:5 only when it is there for the fifth time. The tests walk
// the whole list below: "killed at any moment" is checked at each. Without the
// variables a point costs two branches.
#pragma once

#include <array>
#include <string_view>

namespace vmsnap {

// In the order in which a snapshot, then a restore, passes them.
inline constexpr std::array test_point_names = {
    std::string_view("snapshot.start"),       // arguments read, VM untouched
    std::string_view("snapshot.output"),      // temporary file made
    std::string_view("attach.seized"),        // one VMM thread under ptrace
    std::string_view("attach.created"),       // the VMM holds our uffd too
    std::string_view("attach.detached"),      // ptrace off, uffd ours alone
    std::string_view("snapshot.registered"),  // ranges registered, not armed
    std::string_view("snapshot.armed_ahead"), // nearly all write-protected, the VM runs
    std::string_view("pause.before"),         // guard told, stop not yet sent
    std::string_view("pause.stopped"),        // the VM stands still
    std::string_view("pause.state_saved"),    // device state taken
    std::string_view("pause.half_armed"),     // some ranges write-protected
    std::string_view("pause.armed"),          // all are
    std::string_view("pause.resumed"),        // the VM runs again
    std::string_view("copy.fault"),           // one writer waits, nothing copied for it; each time
    std::string_view("copy.half"),            // about half the pages copied
    std::string_view("copy.done"),            // all copied, the guest let go
    std::string_view("store.pack_started"),     // a pack's header written, no frame
    std::string_view("store.packs_ended"),      // every pack has its trailer
    std::string_view("store.packs_synced"),     // and is fsynced, under no name
    std::string_view("commit.written"),       // all bytes written, no fsync
    std::string_view("commit.synced"),        // fsynced, not renamed
    std::string_view("commit.renamed"),       // under its final name
    std::string_view("store.manifest_synced"),  // all is on the disk, under no name
    std::string_view("store.pack_renamed"),     // one pack under its name
    std::string_view("store.packs_renamed"),    // all packs are, no manifest
    std::string_view("store.manifest_renamed"), // the snapshot is there
    std::string_view("store.indexed"),          // and the next one finds its pages
    std::string_view("prune.manifest_deleted"), // one snapshot gone for good
    std::string_view("repack.packs_synced"),    // what is needed was copied, under no name
    std::string_view("repack.packs_renamed"),   // the copies are there, nobody needs them
    std::string_view("repack.manifest_renamed"),// one snapshot needs them
    std::string_view("prune.pack_condemned"),   // one dead pack out of sight
    std::string_view("prune.epoch_ended"),      // all are, for whoever begins now
    std::string_view("prune.pack_deleted"),     // one pack gone for good
    std::string_view("repair.quarantining"),    // about to put one file out of the way
    std::string_view("repair.index_removed"),   // an index is to be made anew
    std::string_view("restore.start"),        // image open, run directory made
    std::string_view("restore.launched"),     // QEMU started, waiting
    std::string_view("restore.registered"),   // its RAM is served by us
    std::string_view("restore.loading"),      // device state on its way
    std::string_view("restore.running"),      // the guest executes
    std::string_view("background.start"),     // a process of its own is to serve from here on
    std::string_view("restore.half"),         // about half the pages are there
    std::string_view("restore.filled"),       // all are, uffd still held
    std::string_view("park.start"),           // run directory made, VM untouched
    std::string_view("park.captured"),        // image committed, VM paused
    std::string_view("park.attached"),        // the VMM holds our uffd, nothing is watched
    std::string_view("park.frozen"),          // all is watched and write-protected
    std::string_view("park.compared"),        // the image is right, nothing is dropped
    std::string_view("park.removing"),        // a thread of the VMM waits in madvise
    std::string_view("park.half_dropped"),    // about half of the memory is gone
    std::string_view("park.dropped"),         // all is, protection still on
    std::string_view("park.thawed"),          // it waits for a page server
    std::string_view("unpark.resumed"),       // it runs, its page server does not know
    std::string_view("unpark.told"),          // the page server knows, nothing is loaded ahead
};

// Aborts the build, not the program, if `name` is not in the list.
#define VMSNAP_TEST_POINT(name)                                              \
  do {                                                                       \
    static_assert(::vmsnap::is_test_point(name), "not in test_point_names"); \
    ::vmsnap::reach_test_point(name);                                        \
  } while (false)

constexpr bool is_test_point(std::string_view name) {
  for (std::string_view known : test_point_names) {
    if (known == name) return true;
  }
  return false;
}

void reach_test_point(std::string_view name);

}  // namespace vmsnap
