"""Snapshots in a store: of real guests, found, restored, removed, through pipes."""

import os
import re
import subprocess
import time

import pytest

import checks
import harness
import qemu
import system
import victims


def snapshot(world, store, *target):
    return world.vmsnap("snapshot", *target, "--store", store, "--json").expect("ok").json


def listed(world, store, *arguments):
    return world.vmsnap("list", "--store", store, "--json", *arguments).expect("ok").json


def assert_whole(world, store, *arguments):
    world.vmsnap("verify", "--store", store, *arguments).expect("ok")


@pytest.mark.parametrize("sealed, deltas", [(False, []), (True, []), (True, ["--delta"])],
                         ids=["clear", "sealed", "sealed-deltas"])
def test_a_linux_guest_goes_on_from_each_snapshot(world, sealed, deltas):
    key = world.path("key")
    key.write_bytes(b"\x01\x02 any bytes")
    key.chmod(0o600)
    options = ["--key-file", key] if sealed else []
    guest = victims.LinuxGuest(world, mib=256, check_mib=4)
    store = world.path("store")
    first = snapshot(world, store, "--qmp", guest.qmp_socket, "--tag", "a", *options, *deltas)
    victims.assert_linux_goes_on(guest)
    second = snapshot(world, store, "--qmp", guest.qmp_socket, *options, *deltas)
    checks.assert_running(guest)
    assert second["pages"]["stored"] < first["pages"]["stored"] / 2, "nothing is shared"
    assert second["bytes"]["image"] < first["bytes"]["image"] / 2, "it costs more than it adds"
    entries = listed(world, store, *options)
    assert [entry["id"] for entry in entries] == [first["id"], second["id"]]
    assert entries[0]["tags"] == ["a"] and entries[1]["tags"] == []
    assert_whole(world, store, *options)
    for name in (first["id"][:10], "latest"):
        run_dir = world.path("run")
        world.vmsnap("restore", "--store", store, name, "--run-dir", run_dir, *options).expect("ok")
        victims.assert_linux_goes_on(qemu.restored(run_dir))
    if sealed:
        world.vmsnap("list", "--store", store).expect("wrong_key")
        run_dir = world.path("run")
        result = world.vmsnap("restore", "--store", store, "latest", "--run-dir", run_dir)
        result.expect("wrong_key")


def test_the_image_is_one_instant(world):
    """The writers' oracle, on what an export of the store says."""
    victim = victims.Writers(world, mib=32)
    store = world.path("store")
    for _ in range(3):
        figures = snapshot(world, store, "--pid", victim.pid, *victim.range_arguments())
        image = world.path("x.img")
        world.vmsnap("export", "--store", store, figures["id"], "--image", image).expect("ok")
        victim.check_image(world, image)
        victim.assert_live()
    assert_whole(world, store)


def test_a_page_server_that_dies_is_followed_by_another(world):
    guest = victims.LinuxGuest(world, mib=192, check_mib=4)
    store = world.path("store")
    snapshot(world, store, "--qmp", guest.qmp_socket)
    run_dir = world.path("run")
    world.vmsnap("restore", "--store", store, "latest", "--run-dir", run_dir,
                 env={"VMSNAP_KILL_AT": "restore.running"})
    world.vmsnap("restore", "--reattach", run_dir).expect("ok")
    victims.assert_linux_goes_on(qemu.restored(run_dir))


@pytest.mark.parametrize("place", ["disk", "fuse"])
def test_through_pipes(world, place):
    """Out of one store, into another: nothing but the id is different."""
    victim = victims.Writers(world, mib=16)
    folder = system.mount_fuse(world) if place == "fuse" else world.folder
    first, second = folder / "first", folder / "second"
    figures = snapshot(world, first, "--pid", victim.pid, *victim.range_arguments())
    out = subprocess.Popen([harness.VMSNAP, "export", "--store", first, figures["id"], "--image", "-"],
                           stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(folder)})
    subprocess.run([harness.VMSNAP, "import", "-", "--store", second, "--tag", "moved"],
                   stdin=out.stdout, check=True, stdout=subprocess.DEVNULL)
    out.stdout.close()
    assert out.wait() == 0
    assert_whole(world, second)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    raws = []
    for store in (first, second):
        raws.append(world.path("x.raw"))
        world.vmsnap("export", "--store", store, "latest", "--raw", raws[-1]).expect("ok")
    assert subprocess.run(["cmp", *raws], check=False).returncode == 0
    assert listed(world, second)[0]["tags"] == ["moved"]


def test_removed_undeleted_pruned(world):
    victim = victims.Writers(world, mib=16)
    store = world.path("store")
    ids = [snapshot(world, store, "--pid", victim.pid, *victim.range_arguments())["id"]
           for _ in range(3)]
    world.vmsnap("rm", "--store", store, ids[0]).expect("ok")
    assert [entry["id"] for entry in listed(world, store)] == ids[1:]
    world.vmsnap("undelete", "--store", store, ids[0]).expect("ok")
    dry = world.vmsnap("prune", "--store", store, "--keep-last", "1", "--dry-run", "--json")
    kept = {d["id"]: d["keep"] for d in dry.expect("ok").json["decisions"]}
    assert kept == {ids[0]: False, ids[1]: False, ids[2]: True}
    assert [entry["id"] for entry in listed(world, store)] == ids
    world.vmsnap("prune", "--store", store, "--keep-last", "1").expect("ok")
    assert [entry["id"] for entry in listed(world, store)] == ids[2:]
    world.vmsnap("undelete", "--store", store, ids[1]).expect("ok")
    assert_whole(world, store)
    world.vmsnap("prune", "--store", store).expect("ok")
    world.vmsnap("undelete", "--store", store, ids[0]).expect("usage")
    assert_whole(world, store)
    # The last of all goes: so does every pack.
    world.vmsnap("rm", "--store", store, *ids[1:]).expect("ok")
    world.vmsnap("prune", "--store", store).expect("ok")
    assert not list((store / "packs").iterdir()) and not list((store / "condemned").iterdir())


def test_prune_beside_a_restore_and_a_snapshot(world):
    """What somebody uses stays until he is done, and nobody waits for it."""
    victim = victims.Writers(world, mib=16)
    store = world.path("store")
    target = ["--pid", victim.pid, *victim.range_arguments()]
    old = snapshot(world, store, *target)["id"]
    # A snapshot that shares pages with one that goes while it runs.
    run = world.start_vmsnap("snapshot", *target, "--store", store, *harness.PATIENT,
                             env={"VMSNAP_STOP_AT": "store.packs_synced"})
    run.wait_stopped()
    world.vmsnap("rm", "--store", store, old).expect("ok")
    report = world.vmsnap("prune", "--store", store, "--json").expect("ok").json
    assert report["in_use"] == 1 and report["packs_deleted"] == 0, report
    run.signal(18)
    run.wait().expect("ok")
    assert_whole(world, store)
    victim.assert_live()
    report = world.vmsnap("prune", "--store", store, "--json").expect("ok").json
    assert_whole(world, store)


def test_damage_is_found_and_named(world):
    victim = victims.Writers(world, mib=16)
    store = world.path("store")
    figures = snapshot(world, store, "--pid", victim.pid, *victim.range_arguments())
    pack = next((store / "packs").iterdir())
    with open(pack, "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    result = world.vmsnap("verify", "--store", store, "--json").expect("damaged")
    assert [s["id"] for s in result.json["damaged_snapshots"]] == [figures["id"]]
    assert result.json["damaged_snapshots"][0]["pages"]["damaged"] >= 1
    assert re.search(r"vmsnap repair --store", result.err), result.err
    world.vmsnap("verify", "--store", store, figures["id"]).expect("damaged")
    # Out of the way, it is still read where it is whole; what is lost is stored
    # again with the next snapshot.
    world.vmsnap("repair", "--store", store).expect("ok")
    assert [p.name for p in (store / "quarantine").iterdir()] == [pack.name]
    lost = world.vmsnap("verify", "--store", store, figures["id"], "--json").expect("damaged").json
    pages = [json["damaged_snapshots"][0]["pages"] for json in (lost, result.json)]
    assert pages[0] == pages[1]
    again = snapshot(world, store, "--pid", victim.pid, *victim.range_arguments())
    world.vmsnap("verify", "--store", store, again["id"]).expect("ok")
    diff = world.vmsnap("diff", "--store", store, again["id"], again["id"], "--json").expect("ok")
    assert diff.json["differing_pages"] == 0


def test_keys_change_and_packs_stay(world):
    victim = victims.Writers(world, mib=16)
    store = world.path("store")
    keys = [world.path("key") for _ in range(2)]
    for i, key in enumerate(keys):
        key.write_text(f"key number {i}")
        key.chmod(0o600)
    old, new = (["--key-file", key] for key in keys)
    snapshot(world, store, "--pid", victim.pid, *victim.range_arguments(), *old)
    packs = {path.name: path.stat().st_mtime_ns for path in (store / "packs").iterdir()}
    world.vmsnap("list", "--store", store, *new).expect("wrong_key")
    world.vmsnap("key", "--store", store, *old, "--new-key-file", keys[1]).expect("ok")
    listed_keys = world.vmsnap("key", "--store", store, *new).expect("ok").out.split("\n")
    assert len(listed_keys) == 3, listed_keys
    world.vmsnap("key", "--store", store, *new, "--remove", listed_keys[0].split()[0]).expect("ok")
    world.vmsnap("list", "--store", store, *old).expect("wrong_key")
    assert_whole(world, store, *new)
    last = listed_keys[1].split()[0]
    world.vmsnap("key", "--store", store, *new, "--remove", last).expect("refused")
    assert packs == {path.name: path.stat().st_mtime_ns for path in (store / "packs").iterdir()}


def test_diff_says_where(world):
    victim = victims.Writers(world, mib=16)
    store = world.path("store")
    victim.stop()
    ids = []
    for _ in range(2):
        ids.append(snapshot(world, store, "--pid", victim.pid, *victim.range_arguments())["id"])
        victim.go_on()
        time.sleep(0.2)
        victim.stop()
    raws = []
    for name in ids:
        raws.append(world.path("x.raw"))
        world.vmsnap("export", "--store", store, name, "--raw", raws[-1]).expect("ok")
    victim.go_on()
    diff = world.vmsnap("diff", "--store", store, *ids, "--json").expect("ok").json
    a, b = (raw.read_bytes() for raw in raws)
    wanted = {i for i in range(0, len(a), 4096) if a[i:i + 4096] != b[i:i + 4096]}
    said = {offset for r in diff["regions"][0]["ranges"]
            for offset in range(r["offset"], r["offset"] + r["length"], 4096)}
    assert said == wanted and wanted, f"{len(said)} pages, not {len(wanted)}"


def test_is_the_newest_fresh(world):
    victim = victims.Writers(world, mib=16)
    store = world.path("store")
    snapshot(world, store, "--pid", victim.pid, *victim.range_arguments())
    world.vmsnap("list", "--store", store, "--max-age", "1h").expect("ok")
    time.sleep(1.1)
    world.vmsnap("list", "--store", store, "--max-age", "1s").expect("stale")
    world.vmsnap("list", "--store", store, "--vm", "another", "--max-age", "1h").expect("stale")
    world.vmsnap("list", "--store", world.path("none")).expect("usage")
