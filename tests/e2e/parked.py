"""Parking, for the tests of it."""

import json
import pathlib
import re

import checks
import harness
import qemu
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


def check_ordered_by_touch(world, guest):
    """The oracle's look at a parked guest, through QEMU, which touches every page.
    (What /proc/PID/mem finds missing it does not wait for.)"""
    ram = world.path("ram.raw")
    start, end = victims.ORDERED_START, victims.ORDERED_END
    guest.qmp("pmemsave", val=start, size=end - start, filename=str(ram))
    victims.check_ordered(ram)


def wait_for_end(world, run_dir):
    """Until the page server has let go of the VM."""
    harness.wait_until(lambda: not world.vmsnap_processes(), "the page server to end")
    assert record(run_dir)["phase"] == "complete", record(run_dir)


def unpark_and_check(world, guest, run_dir):
    """An OrderedGuest has all of its memory back, and goes on."""
    world.vmsnap("unpark", "--run-dir", run_dir).expect("ok")
    wait_for_end(world, run_dir)
    victims.check_ordered_live(world, guest)
    checks.assert_running(guest)


def wait_for_phase(run_dir, phase):
    harness.wait_until(lambda: record(run_dir)["phase"] == phase,
                       lambda: f"{phase}, from {record(run_dir)['phase']}")
