"""Whoever is killed while a VM is parked or unparked: the VM has its memory, or waits
until somebody brings it."""

import pathlib
import re
import signal

import pytest

import checks
import harness
import system
import victims
from parked import check_ordered_by_touch, park, record, unpark_and_check, wait_for_end

POINTS = re.findall(r'std::string_view\("([\w.]+)"\)',
                    (harness.SOURCE / "formats/test_point.h").read_text())

# Killed up to here, the VM runs on by itself.
GUARDED = ["park.start", "attach.created", "pause.stopped", "pause.armed", "copy.half",
           "store.packs_synced", "store.manifest_synced", "store.manifest_renamed", "store.indexed"]
# Afterwards it waits for who takes over.
WAITING = [point for point in POINTS if point.startswith("park.") and point != "park.start"]


@pytest.mark.parametrize("point", GUARDED)
def test_killed_before_the_image_is_there(shared_world, guest, point):
    run_dir = shared_world.path("run")
    result = shared_world.vmsnap("park", "--qmp", guest.qmp_socket, "--store",
                                 shared_world.path("store"), "--run-dir", run_dir,
                                 env={"VMSNAP_KILL_AT": point})
    assert result.code == -signal.SIGKILL, f"never got to {point}: {result}"
    checks.assert_running(guest)
    said = shared_world.vmsnap("unpark", "--run-dir", run_dir).expect("ok")
    assert "not been parked" in said.out
    again = shared_world.vmsnap("unpark", "--run-dir", run_dir, "--json").expect("ok").json
    assert (again["phase"], again["pid"]) == ("complete", guest.pid)
    checks.assert_running(guest)
    victims.check_ordered_live(shared_world, guest)


@pytest.mark.parametrize("way", ["unpark", "reattach"])
@pytest.mark.parametrize("point", WAITING)
def test_killed_on_the_way(world, point, way):
    ram = "two-backends" if way == "unpark" and point != "park.removing" else "anon"
    guest = victims.OrderedGuest(world, ram=ram)
    run_dir, image = world.path("run"), world.path("vm.img")
    result = world.vmsnap("park", "--qmp", guest.qmp_socket, "--output", image, "--run-dir",
                          run_dir, env={"VMSNAP_KILL_AT": point})
    assert result.code == -signal.SIGKILL, f"never got to {point}: {result}"
    if way == "reattach":
        world.vmsnap("restore", "--reattach", run_dir).expect("ok")
        if point != "park.captured":
            assert record(run_dir)["phase"] == "parked"
            assert guest.status() == "paused"
            check_ordered_by_touch(world, guest)
    if way == "unpark" or point != "park.captured":
        unpark_and_check(world, guest, run_dir)


@pytest.mark.parametrize("point", ["unpark.told", "restore.half", "restore.filled"])
def test_page_server_killed_after_unpark(world, point):
    guest = victims.OrderedGuest(world)
    run_dir, _, _ = park(world, guest, env={"VMSNAP_KILL_AT": point})
    world.vmsnap("unpark", "--run-dir", run_dir).expect("ok")
    if point != "unpark.told":  # there, unpark itself has taken over
        harness.wait_until(lambda: not world.vmsnap_processes(), f"the death at {point}")
        world.vmsnap("restore", "--reattach", run_dir).expect("ok")
    wait_for_end(world, run_dir)
    victims.check_ordered_live(world, guest)
    checks.assert_running(guest)


def test_unpark_killed(world):
    """The VM runs, and its server goes on bringing what is touched."""
    guest = victims.OrderedGuest(world)
    run_dir, _, _ = park(world, guest)
    result = world.vmsnap("unpark", "--run-dir", run_dir, env={"VMSNAP_KILL_AT": "unpark.resumed"})
    assert result.code == -signal.SIGKILL
    guest.wait_for_progress()
    unpark_and_check(world, guest, run_dir)


def test_page_server_killed_while_it_is_parked(world):
    """The guest, resumed, waits; and a new server goes on, as often as it takes."""
    guest = victims.OrderedGuest(world)
    run_dir, _, done = park(world, guest)
    checks.assert_unprivileged(done["server_pid"])
    system.kill(done["server_pid"])
    again = world.vmsnap("restore", "--reattach", run_dir, "--json").expect("ok").json
    assert (again["phase"], again["pid"]) == ("parked", guest.pid)
    assert again["server_pid"] == record(run_dir)["server_pid"]
    guest.qmp("cont")
    guest.wait_for_progress()
    system.kill(record(run_dir)["server_pid"])
    world.vmsnap("restore", "--reattach", run_dir).expect("ok")
    guest.qmp("stop")
    check_ordered_by_touch(world, guest)
    guest.qmp("cont")
    system.kill(record(run_dir)["server_pid"])
    unpark_and_check(world, guest, run_dir)


def test_the_closer_killed_while_it_is_parked(world):
    """Who is to let go of the VM at the end is gone: it has its memory, and says so."""
    guest = victims.OrderedGuest(world)
    run_dir, _, done = park(world, guest)
    server = pathlib.Path(f"/proc/{done['server_pid']}/task/{done['server_pid']}")
    checks.assert_unprivileged(done["server_pid"])
    closer = int((server / "children").read_text())
    harness.wait_until(lambda: pathlib.Path(f"/proc/{closer}/comm").read_text() == "snapcloser\n",
                       "the closer to be ready")
    system.kill(closer)
    world.vmsnap("unpark", "--run-dir", run_dir).expect("ok")
    harness.wait_until(lambda: not world.vmsnap_processes(), "its end")
    assert record(run_dir)["phase"] == "filled"
    assert "cannot" in (run_dir / "vmsnap.log").read_text()
    victims.check_ordered_live(world, guest)
    world.vmsnap("restore", "--reattach", run_dir).expect("ok")
    assert record(run_dir)["phase"] == "complete"
    checks.assert_running(guest)
