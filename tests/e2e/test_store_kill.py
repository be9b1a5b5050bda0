"""vmsnap killed, or out of space, at every step of what it does with a store:
committed snapshots stay whole, and the next prune frees what was left."""

import re
import signal
import time

import pytest

import harness
import system
import victims

POINTS = re.findall(r'std::string_view\("([\w.]+)"\)',
                    (harness.SOURCE / "formats/test_point.h").read_text())
WRITE_POINTS = [point for point in POINTS if point.startswith("store.")] + ["commit.written"]
REPAIR_POINTS = [point for point in POINTS if point.startswith("repair.")]
PRUNE_POINTS = [point for point in POINTS if point.startswith("prune.")]
REPACK_POINTS = [point for point in POINTS if point.startswith("repack.")]


@pytest.fixture(name="victim")
def a_victim(world):
    return victims.Writers(world, mib=16)


def target(victim):
    return ["--pid", victim.pid, *victim.range_arguments()]


def ids(world, store):
    return world.vmsnap("list", "--store", store, "--quiet").expect("ok").out.split()


def assert_nothing_is_left(world, store):
    """Prune twice: no file but what the snapshots need."""
    world.vmsnap("prune", "--store", store).expect("ok")
    world.vmsnap("prune", "--store", store).expect("ok")
    for folder in ("tmp", "condemned", "trash"):
        assert not list((store / folder).iterdir()), f"left in {folder}"
    world.vmsnap("verify", "--store", store).expect("ok")


def test_kill_a_snapshot(world, victim):
    store = world.path("store")
    before = [world.vmsnap("snapshot", *target(victim), "--store", store, "--json").expect("ok").json["id"]]
    for point in WRITE_POINTS:
        result = world.vmsnap("snapshot", *target(victim), "--store", store,
                              env={"VMSNAP_KILL_AT": point})
        assert result.code == -signal.SIGKILL, f"never got to {point}: {result}"
        harness.wait_until(lambda: not world.vmsnap_processes(), "helper processes to end", limit=30)
        victim.assert_live()
        now = ids(world, store)
        # There is one more, whole, exactly when its manifest got its name.
        committed = point in ("store.manifest_renamed", "store.indexed")
        assert len(now) == len(before) + committed, f"{point}: {now}"
        assert set(before) <= set(now)
        world.vmsnap("verify", "--store", store).expect("ok")
        before = now
    assert_nothing_is_left(world, store)
    assert sorted(ids(world, store)) == sorted(before)


def test_kill_a_prune(world, victim):
    for point in PRUNE_POINTS:
        store = world.path("store")
        made = [world.vmsnap("snapshot", *target(victim), "--store", store, "--json").expect("ok")
                .json["id"] for _ in range(3)]
        world.vmsnap("rm", "--store", store, *made).expect("ok")
        result = world.vmsnap("prune", "--store", store, env={"VMSNAP_KILL_AT": point})
        assert result.code == -signal.SIGKILL, f"never got to {point}: {result}"
        assert ids(world, store) == []
        world.vmsnap("verify", "--store", store).expect("ok")
        assert_nothing_is_left(world, store)


def bytes_of(world, store, snapshot):
    raw = world.path("bytes.raw")
    world.vmsnap("export", "--store", store, snapshot, "--raw", raw).expect("ok")
    content = raw.read_bytes()
    raw.unlink()
    return content


def test_kill_a_repack(world, victim):
    """What is left of a night that went is moved: the other nights stay exact."""
    for point in REPACK_POINTS:
        store = world.path("store")
        first, second = (world.vmsnap("snapshot", *target(victim), "--store", store, "--json")
                         .expect("ok").json["id"] for _ in range(2))
        before = bytes_of(world, store, second)
        world.vmsnap("rm", "--store", store, first).expect("ok")
        result = world.vmsnap("prune", "--store", store, env={"VMSNAP_KILL_AT": point})
        assert result.code == -signal.SIGKILL, f"never got to {point}: {result}"
        assert ids(world, store) == [second]
        world.vmsnap("verify", "--store", store).expect("ok")
        assert bytes_of(world, store, second) == before
        assert_nothing_is_left(world, store)
        assert bytes_of(world, store, second) == before


def test_import_killed_beside_a_prune(world, victim):
    """Both at once, the import killed at each of its steps, and at any moment between them."""
    image = world.path("process.img")
    world.vmsnap("snapshot", *target(victim), "--output", image).expect("ok")
    store = world.path("store")
    kept = world.vmsnap("snapshot", *target(victim), "--store", store, "--json").expect("ok").json["id"]
    for delay, point in enumerate([*WRITE_POINTS, None, None, None]):
        importing = world.start_vmsnap("import", "--store", store, image,
                                       env={"VMSNAP_KILL_AT": point} if point else None)
        pruning = world.start_vmsnap("prune", "--store", store, "--lock-wait", "1m")
        if point is None:  # may be over before the signal: then it just imported
            time.sleep(0.005 * delay)
            importing.signal(signal.SIGKILL)
        code = importing.wait().code
        assert point is None or code == -signal.SIGKILL, f"never got to {point}"
        pruning.wait().expect("ok")
        assert kept in ids(world, store)
        world.vmsnap("verify", "--store", store).expect("ok")
    assert_nothing_is_left(world, store)


def test_kill_a_repair(world, victim):
    for point in REPAIR_POINTS:
        store = world.path("store")
        world.vmsnap("snapshot", *target(victim), "--store", store).expect("ok")
        pack = next((store / "packs").iterdir())
        with open(pack, "r+b") as file:
            file.seek(4096 + 20)
            file.write(b"damage")
        world.vmsnap("verify", "--store", store).expect("damaged")
        result = world.vmsnap("repair", "--store", store, env={"VMSNAP_KILL_AT": point})
        assert result.code == -signal.SIGKILL, f"never got to {point}: {result}"
        world.vmsnap("repair", "--store", store).expect("ok")
        assert (store / "quarantine" / pack.name).exists()
        new = world.vmsnap("snapshot", *target(victim), "--store", store, "--json").expect("ok")
        world.vmsnap("verify", "--store", store, new.json["id"]).expect("ok")
        lost = [one for one in ids(world, store) if one != new.json["id"]]
        world.vmsnap("rm", "--store", store, *lost).expect("ok")
        assert_nothing_is_left(world, store)


def test_no_space(world, victim):
    """A disk that is full at each of many sizes: an error that says so, and a
    store that is whole and goes on when there is space."""
    failed = 0
    for kib in (600, 1200, 2500, 5000, 9000, 14000):
        disk = system.mount_small_disk(world, kib)
        store = disk / "store"
        result = world.vmsnap("snapshot", *target(victim), "--store", store)
        if result.code == 0:
            world.vmsnap("verify", "--store", store).expect("ok")
            continue
        failed += 1
        result.expect("no_space")
        victim.assert_live()
        if (store / "store.json").exists():
            assert ids(world, store) == []
            assert not list((store / "tmp").iterdir()), "the space is not given back"
    assert failed >= 2, "no disk was too small"
