"""A disk that is full, or broken, from any one write on: an exit status that says
so, committed snapshots stay whole, and nothing of what was begun stays for ever."""

import errno
import shutil

import pytest

import harness
import system
import victims
from test_store_kill import assert_nothing_is_left, bytes_of, ids, target

LIBRARY = harness.BUILD / "tests" / "libfail_writes.so"


class Store:
    """A store with two snapshots of a process, of which the first is in the trash:
    prune has something to delete and something to repack."""

    def __init__(self, world):
        self.world = world
        self.victim = victims.Writers(world, mib=16)
        self.image = world.path("process.img")
        world.vmsnap("snapshot", *target(self.victim), "--output", self.image).expect("ok")
        self.pristine = world.path("pristine")
        first, self.kept = (
            world.vmsnap("snapshot", *target(self.victim), "--store", self.pristine, "--json")
            .expect("ok").json["id"] for _ in range(2))
        world.vmsnap("rm", "--store", self.pristine, first).expect("ok")
        self.content = bytes_of(world, self.pristine, self.kept)

    def copy(self):
        path = self.world.path("store")
        shutil.copytree(self.pristine, path)
        return path

    def damage(self, path):
        """Something for repair to put aside: a pack that nobody knows."""
        pack = next((path / "packs").iterdir())
        unknown = path / "packs" / ("0" * 31 + "1")
        shutil.copy(pack, unknown)


COMMANDS = {
    "snapshot": lambda s, path: ["snapshot", *target(s.victim), "--store", path],
    "import": lambda s, path: ["import", "--store", path, s.image],
    "prune": lambda s, path: ["prune", "--store", path],
    "repair": lambda s, path: ["repair", "--store", path],
}


@pytest.mark.parametrize("name, error", [
    ("snapshot", errno.ENOSPC), ("import", errno.EIO),
    ("prune", errno.ENOSPC), ("repair", errno.ENOSPC)])
def test_every_write(world, name, error):
    store = Store(world)
    expected = "no_space" if error == errno.ENOSPC else "io"
    failed = at = 0
    # The first ones one by one, then ever more apart: most are data.
    while True:
        at += 1 if at < 16 else max(1, at // 8)
        path = store.copy()
        if name == "repair":
            store.damage(path)
        note = world.path("note")
        result = world.vmsnap(*COMMANDS[name](store, path), env={
            "LD_PRELOAD": str(LIBRARY), "FAIL_UNDER": str(path), "FAIL_AT": str(at),
            "FAIL_WITH": str(error), "FAIL_NOTE": str(note)})
        reached = note.exists()
        if reached:
            note.unlink()
            # The index is made of hints: to fail there is worth a warning only.
            result.expect(expected, "ok")
            failed += result.code != 0
        else:
            result.expect("ok")
        assert store.kept in ids(world, path), f"write {at}"
        assert bytes_of(world, path, store.kept) == store.content, f"write {at}"
        if name != "repair":
            world.vmsnap("verify", "--store", path).expect("ok")
            assert_nothing_is_left(world, path)
        shutil.rmtree(path)
        if not reached:
            break
    print(f"{name}: {at} writes, {failed} runs failed")
    assert failed >= 2
    if name == "snapshot":
        store.victim.assert_live()


def fill(path):
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as full:
            assert full.errno == errno.ENOSPC


def test_prune_on_a_full_disk(world):
    """It makes room by what is dead, and repacks if that is enough."""
    victim = victims.Writers(world, mib=16)
    disk = system.mount_small_disk(world, 64 << 10)
    store, filler = disk / "store", disk / "filler"

    def snapshot(*options):
        return world.vmsnap("snapshot", *target(victim), "--store", store, "--json",
                            *options).expect("ok").json["id"]

    gone, kept, dead = snapshot(), snapshot(), snapshot("--dedup-domain", "another")
    content = bytes_of(world, store, kept)
    world.vmsnap("rm", "--store", store, gone).expect("ok")
    fill(filler)
    result = world.vmsnap("prune", "--store", store, "--json").expect("ok")
    assert result.json["deleted"] == 1 and result.json["packs_repacked"] == 0, str(result)
    assert "--repack-below 0" in result.err, str(result)
    assert not list((store / "tmp").iterdir())
    world.vmsnap("rm", "--store", store, dead).expect("ok")
    fill(filler.with_name("more"))
    result = world.vmsnap("prune", "--store", store, "--json").expect("ok")
    assert result.json["packs_deleted"] == 2 and result.json["packs_repacked"] == 1, str(result)
    assert bytes_of(world, store, kept) == content
    world.vmsnap("verify", "--store", store).expect("ok")
