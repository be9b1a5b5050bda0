"""A parked VM takes no memory, waits, and is the same afterwards, byte by byte."""

import pathlib
import re
import signal

import pytest

import checks
import harness
import qemu
import system
import victims
from parked import (memory_of, park, record, resident_kib, unpark_and_check, wait_for_end,
                    wait_for_phase)


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


def test_in_a_store_that_is_pruned(world):
    """The page server keeps what it needs, whatever is removed meanwhile."""
    guest = victims.OrderedGuest(world)
    store = world.path("store")
    key = world.path("key")
    key.write_text("a key\n")
    key.chmod(0o600)
    run_dir = world.path("run")
    world.vmsnap("park", "--qmp", guest.qmp_socket, "--store", store, "--key-file", key, "--tag",
                 "parked", "--run-dir", run_dir).expect("ok")
    listed = world.vmsnap("list", "--store", store, "--key-file", key, "--json").expect("ok").json
    assert [entry["tags"] for entry in listed] == [["parked"]]
    world.vmsnap("rm", "--store", store, "--key-file", key, listed[0]["id"]).expect("ok")
    for _ in range(2):
        world.vmsnap("prune", "--store", store, "--key-file", key, "--empty-trash").expect("ok")
    unpark_and_check(world, guest, run_dir)


def test_by_its_monitor_again_and_again(world):
    """Without --run-dir, unpark finds the directory that park made. Parked again
    into a directory that is named, and once more into the same."""
    guest = victims.OrderedGuest(world)
    image = world.path("vm.img")
    done = world.vmsnap("park", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    run_dir = pathlib.Path(re.search(r"is parked in (\S+)", done.out).group(1))
    world.at_end(lambda: system.remove_folder(run_dir))
    second = world.vmsnap("park", "--qmp", guest.qmp_socket, "--output", image, "--force")
    second.expect("refused")
    assert "userfaultfd" in second.err
    world.vmsnap("unpark", "--qmp", guest.qmp_socket).expect("ok")
    wait_for_end(world, run_dir)
    world.vmsnap("unpark", "--qmp", guest.qmp_socket).expect("vm")
    assert "already" in world.vmsnap("unpark", "--run-dir", run_dir).expect("ok").out
    named = world.path("run")
    for _ in range(2):
        world.vmsnap("park", "--qmp", guest.qmp_socket, "--output", image, "--force", "--run-dir",
                     named).expect("ok")
        world.vmsnap("unpark", "--run-dir", named).expect("ok")
        wait_for_end(world, named)
    victims.check_ordered_live(world, guest)
    checks.assert_running(guest)


def test_what_else_park_may_meet(world):
    """Nothing is touched of a VM whose memory could not come back."""
    for ram, extra in (("file-private", []), ("anon", ["-overcommit", "mem-lock=on"])):
        guest = victims.OrderedGuest(world, ram=ram, extra=extra)
        folder, run_dir = world.directory("out"), world.path("run")
        world.vmsnap("park", "--qmp", guest.qmp_socket, "--output", folder / "x.img",
                     "--run-dir", run_dir).expect("refused")
        checks.assert_only(folder)
        assert not run_dir.exists()
        checks.assert_running(guest)


def test_memory_of_hugetlbfs_is_refused(world):
    system.add_huge_pages(world, 160)
    guest = victims.OrderedGuest(world, extra=[
        "-object", "memory-backend-memfd,id=ram0,size=128M,share=on,hugetlb=on",
        "-machine", "memory-backend=ram0"])
    refused = world.vmsnap("park", "--qmp", guest.qmp_socket, "--output", world.path("x.img"),
                           "--run-dir", world.path("run")).expect("refused")
    assert "hugetlbfs" in refused.err
    checks.assert_running(guest)


def test_unprivileged_and_sandboxed(world):
    guest = victims.OrderedGuest(world, unprivileged=True)
    files = checks.open_files(guest.pid)
    run_dir, _, _ = park(world, guest)
    assert resident_kib(guest.pid, run_dir) < guest.mib
    world.vmsnap("unpark", "--run-dir", run_dir).expect("ok")
    wait_for_end(world, run_dir)
    checks.assert_running(guest, files)
    victims.check_ordered_live(world, guest)


@pytest.mark.parametrize("ram", ["anon", "memfd"])
def test_a_vm_that_ends_while_it_is_parked(world, ram):
    guest = victims.OrderedGuest(world, ram=ram)
    run, run_dir, _ = stopped_park(world, guest, "park.half_dropped")
    guest.kill()
    run.signal(signal.SIGCONT)
    run.wait().expect("vm")
    assert not run_dir.exists()


def test_a_parked_vm_that_ends(world):
    guest = victims.OrderedGuest(world)
    run_dir, _, _ = park(world, guest)
    guest.kill()
    harness.wait_until(lambda: not world.vmsnap_processes(), "the page server to end")
    assert record(run_dir)["phase"] == "ended"
    world.vmsnap("unpark", "--run-dir", run_dir).expect("vm")


def stopped_park(world, guest, point, *arguments, run_dir=None):
    """A park that stands still at `point`: (the run, its run directory, its image)."""
    run_dir, image = run_dir or world.path("run"), world.path("vm.img")
    run = world.start_vmsnap("park", "--qmp", guest.qmp_socket, "--output", image, "--run-dir",
                             run_dir, *arguments, env={"VMSNAP_STOP_AT": point})
    run.wait_stopped()
    return run, run_dir, image


@pytest.mark.parametrize("point", ["park.captured", "park.attached"])
def test_resumed_before_it_is_frozen(world, point):
    """Somebody else's `cont`: the guest has gone on since the image, so it stays."""
    guest = victims.OrderedGuest(world, second_monitor=True)
    files = checks.open_files(guest.pid)
    run, run_dir, _ = stopped_park(world, guest, point)
    with qemu.Qmp(guest.second_socket) as monitor:
        monitor.execute("cont")
    guest.wait_for_progress()
    run.signal(signal.SIGCONT)
    run.wait().expect("vm")
    assert not run_dir.exists()
    victims.check_ordered_live(world, guest)
    checks.assert_running(guest, [*files, "the other monitor"])


@pytest.mark.parametrize("point, ram", [
    ("park.frozen", "anon"), ("park.compared", "memfd"), ("park.half_dropped", "memfd"),
    ("park.dropped", "anon"), ("park.thawed", "memfd")])
def test_resumed_while_it_is_frozen(world, point, ram):
    """Its first write waits, and no byte of it is lost."""
    guest = victims.OrderedGuest(world, second_monitor=True, ram=ram)
    run, run_dir, _ = stopped_park(world, guest, point)
    with qemu.Qmp(guest.second_socket) as monitor:
        monitor.execute("cont")
    harness.wait_until(lambda: checks.uses_no_processor(guest.pid), "the guest to wait")
    run.signal(signal.SIGCONT)
    run.wait().expect("ok")
    guest.wait_for_progress()
    unpark_and_check(world, guest, run_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("point", ["park.start", "park.captured", "copy.half", "park.frozen"])
def test_interrupted(shared_world, guest, point, number):
    """Before anything is dropped, a signal undoes all."""
    files = checks.open_files(guest.pid)
    run, run_dir, _ = stopped_park(shared_world, guest, point)
    run.signal(number)
    run.signal(signal.SIGCONT)
    run.wait().expect("interrupted")
    assert not run_dir.exists()
    checks.assert_running(guest, files)
    victims.check_ordered_live(shared_world, guest)


def test_stopped_halfway(world):
    """We, while a thread of the VM drops its memory: it is let go, and what was dropped
    comes back."""
    guest = victims.OrderedGuest(world)
    run, run_dir, _ = stopped_park(world, guest, "park.half_dropped")
    harness.wait_until(lambda: not checks.traced_threads(guest.pid), "the thread to be let go")
    run.signal(signal.SIGCONT)
    run.wait().expect("vm")
    checks.assert_goes_on(guest)
    wait_for_end(world, run_dir)
    victims.check_ordered_live(world, guest)
    checks.assert_running(guest)


def test_failing_halfway(world):
    """Shared memory is gone, and a debugger keeps us from dropping the private
    part: the VM runs on, and has what was dropped from the image."""
    guest = victims.OrderedGuest(world, ram="two-backends")
    run, run_dir, _ = stopped_park(world, guest, "park.compared")
    with system.debugged(guest.pid):
        run.signal(signal.SIGCONT)
        run.wait().expect("refused")
        checks.assert_goes_on(guest)
        wait_for_phase(run_dir, "filled")  # but cannot be let go of yet
    harness.wait_until(lambda: not world.vmsnap_processes(), "the page server to end")
    world.vmsnap("unpark", "--run-dir", run_dir).expect("ok")
    victims.check_ordered_live(world, guest)
    checks.assert_running(guest)


def test_a_wrong_image(world):
    """The memory is compared with what can be read from the image, page by page."""
    guest = victims.OrderedGuest(world)
    run, run_dir, image = stopped_park(world, guest, "park.captured")
    middle = image.stat().st_size // 2
    with open(image, "r+b") as file:
        file.seek(middle)
        byte = file.read(1)
        file.seek(middle)
        file.write(bytes([byte[0] ^ 1]))
    run.signal(signal.SIGCONT)
    run.wait().expect("damaged")
    assert not run_dir.exists()
    checks.assert_running(guest)
    victims.check_ordered_live(world, guest)


def test_a_parked_vm_is_not_snapshotted(world):
    """And is told so at once, not after --restore-wait."""
    guest = victims.OrderedGuest(world)
    run_dir, _, _ = park(world, guest)
    refused = world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", world.path("x.img"),
                           "--restore-wait", 3 * harness.LIMIT).expect("refused")
    assert "parked" in refused.err
    unpark_and_check(world, guest, run_dir)


def test_two_take_turns(world):
    """Of two VMs, there is memory for one."""
    group = system.MemoryGroup(world)
    with group.entered():
        first = victims.LinuxGuest(world, mib=384, check_mib=24)
    one = group.used()
    run_dirs = {first: park(world, first)[0]}
    # What QEMU itself has of it (translated code) is not the guest's.
    limit = group.used() + one * 5 // 4
    assert limit < 2 * one, f"{one} bytes before it was parked, {group.used()} afterwards"
    group.limit(limit)
    with group.entered():
        second = victims.LinuxGuest(world, mib=384, check_mib=24)
    run_dirs[second] = park(world, second)[0]
    for _ in range(2):
        for guest, run_dir in run_dirs.items():
            world.vmsnap("unpark", "--run-dir", run_dir).expect("ok")
            victims.assert_linux_goes_on(guest, more_checks=1)
            wait_for_phase(run_dir, "complete")
            run_dirs[guest] = park(world, guest)[0]
    assert group.kills() == 0
    for guest in run_dirs:
        assert harness.is_running(guest.pid)
