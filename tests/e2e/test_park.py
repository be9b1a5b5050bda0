"""A parked VM takes no memory, waits, and is the same afterwards, byte by byte."""

import json
import os
import pathlib
import re

import pytest

import checks
import harness
import linux_guest
import qemu
import system
import victims


def park(world, guest, *arguments, env=None, image=None):
    """Returns (run directory, image, what it printed)."""
    run_dir, image = world.path("run"), image or world.path("vm.img")
    done = world.vmsnap("park", "--qmp", guest.qmp_socket, "--output", image, "--run-dir", run_dir,
                        "--json", *arguments, env=env).expect("ok").json
    return run_dir, image, done


def record(run_dir):
    return json.loads((pathlib.Path(run_dir) / "restore.json").read_text())


def resident_kib(pid, run_dir):
    """How much of the ranges in restore.json is resident, in KiB."""
    ranges = [(int(r["host"]), int(r["host"]) + int(r["length"])) for r in record(run_dir)["ranges"]]
    total, inside = 0, False
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            start, end = (int(word, 16) for word in found.groups())
            inside = any(start < stop and end > begin for begin, stop in ranges)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def memory_of(pid, run_dir):
    return [qemu.read_memory(pid, int(r["host"]), int(r["length"]))
            for r in record(run_dir)["ranges"]]


def wait_for_end(world, run_dir):
    """Until the page server has let go of the VM."""
    harness.wait_until(lambda: not world.vmsnap_processes(), "the page server to end")
    assert record(run_dir)["phase"] == "complete", record(run_dir)


@pytest.mark.parametrize("ram", ["anon", "memfd", "file", "two-backends", "vga"])
def test_a_linux_guest_goes_on(world, ram):
    guest = victims.LinuxGuest(world, ram=ram, mib=256 if ram == "anon" else None, check_mib=4)
    files = checks.open_files(guest.pid)
    run_dir, _, done = park(world, guest)
    assert guest.status() == "paused"
    assert done["pid"] == guest.pid and done["memory_bytes"] >= guest.mib << 20
    assert resident_kib(guest.pid, run_dir) < max(guest.mib, 1), "more than 1 MiB a GiB is left"

    world.vmsnap("unpark", "--run-dir", run_dir).expect("ok")
    assert guest.status() == "running"
    victims.assert_linux_goes_on(guest)
    wait_for_end(world, run_dir)
    checks.assert_unharmed(guest.pid, files)
    victims.assert_linux_goes_on(guest)


@pytest.mark.parametrize("ram", ["anon", "memfd"])
def test_every_byte_comes_back(world, ram):
    """A VM that was paused before stays so, and has all of its memory, zeros included."""
    guest = victims.OrderedGuest(world, ram=ram)
    guest.qmp("stop")
    image = world.path("vm.img")
    run_dir, _, _ = park(world, guest, image=image)
    assert resident_kib(guest.pid, run_dir) < guest.mib
    raw = harness.export(world, image).read_bytes()
    world.vmsnap("unpark", "--run-dir", run_dir).expect("ok")
    wait_for_end(world, run_dir)
    assert guest.status() == "paused", "it had been paused"
    assert b"".join(memory_of(guest.pid, run_dir)) == raw
    checks.assert_unharmed(guest.pid)
    guest.qmp("cont")
    victims.check_ordered_live(world, guest)
    checks.assert_running(guest)


def test_first_touch_is_enough(world):
    """Somebody resumes the VM at its monitor: its pages come, and no others."""
    guest = victims.LinuxGuest(world, mib=256, check_mib=4)
    run_dir, _, _ = park(world, guest)
    guest.qmp("cont")
    victims.assert_linux_goes_on(guest)
    assert record(run_dir)["phase"] == "parked"
    part = resident_kib(guest.pid, run_dir)
    assert 1024 < part < 256 << 10, f"{part} KiB are back"
    world.vmsnap("unpark", "--run-dir", run_dir).expect("ok")
    wait_for_end(world, run_dir)
    victims.assert_linux_goes_on(guest)
    checks.assert_running(guest)
