"""A Linux guest that checks its own memory goes on after a snapshot, and so does
each VM that is restored from it."""

import json
import signal

import pytest

import checks
import harness
import qemu
import victims


def snapshot(world, guest, *arguments):
    image = world.path("vm.img")
    figures = world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image, "--json",
                           *arguments).expect("ok").json
    return image, figures


@pytest.mark.parametrize("unprivileged", [False, True], ids=["root", "nobody-sandboxed"])
def test_original_and_restored_go_on(world, unprivileged):
    guest = victims.LinuxGuest(world, mib=256, check_mib=4, unprivileged=unprivileged)
    files = checks.open_files(guest.pid)
    image, figures = snapshot(world, guest)
    checks.assert_unharmed(guest.pid, files)
    victims.assert_linux_goes_on(guest)
    for name in ("id", "file", "pause_ms", "total_ms", "attach_ms", "pages", "bytes",
                 "write_faults", "fault_us"):
        assert name in figures, f"{name} is not in {figures}"

    # Beside the original: one that waits for all pages, and one that does not.
    first = world.path("run")
    world.vmsnap("restore", image, "--run-dir", first).expect("ok")
    copies = [qemu.restored(first)]
    if not unprivileged:
        second = world.path("run")
        world.vmsnap("restore", image, "--run-dir", second, "--detach").expect("ok")
        copies.append(qemu.restored(second))
    for copy in copies:
        victims.assert_linux_goes_on(copy)
    victims.assert_linux_goes_on(guest)
    harness.wait_until(lambda: not world.vmsnap_processes(), "the page servers to end")
    for copy in copies:
        checks.assert_running(copy)
    json.loads((first / "restore.json").read_text())
    assert guest.pid not in [copy.pid for copy in copies]


def test_deltas(world):
    """A smaller image, made of the live guest or later, from which it goes on."""
    guest = victims.LinuxGuest(world, mib=256, check_mib=4)
    plain, _ = snapshot(world, guest)
    small, _ = snapshot(world, guest, "--delta")
    checks.assert_running(guest)
    later = world.path("later.img")
    world.vmsnap("export", plain, "--image", later, "--delta").expect("ok")
    for image in (small, later):
        assert image.stat().st_size < plain.stat().st_size * 0.97
        world.vmsnap("verify", image).expect("ok")
        run_dir = world.path("run")
        world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
        victims.assert_linux_goes_on(qemu.restored(run_dir))
    assert harness.export(world, later).read_bytes() == harness.export(world, plain).read_bytes()
    farm = world.path("farm")
    started = world.vmsnap("restore", small, "--clones", 2, "--run-dir", farm, "--detach",
                           "--json").expect("ok").json
    for clone in started["clones"]:
        victims.assert_linux_goes_on(qemu.restored(farm / clone["clone"]))
    world.vmsnap("clones", "--run-dir", farm, "--stop").expect("ok")


def test_snapshot_of_a_restored_guest(world):
    """A restored VM is a VM like any other: it can be captured and restored."""
    guest = victims.LinuxGuest(world, mib=192, check_mib=4)
    image, _ = snapshot(world, guest)
    run_dir = world.path("run")
    world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
    copy = qemu.restored(run_dir)
    victims.assert_linux_goes_on(copy)
    second, _ = snapshot(world, copy)
    guest.kill()
    again = world.path("run")
    world.vmsnap("restore", second, "--run-dir", again).expect("ok")
    victims.assert_linux_goes_on(qemu.restored(again))
    victims.assert_linux_goes_on(copy)


def test_snapshot_during_a_lazy_restore(world):
    """Taken while pages are still to come: it waits for them, and has them all."""
    guest = victims.LinuxGuest(world, mib=192, check_mib=4)
    image, _ = snapshot(world, guest)
    guest.kill()
    run_dir = world.path("run")
    restore = world.start_vmsnap("restore", image, "--run-dir", run_dir,
                                 env={"VMSNAP_STOP_AT": "restore.half"})
    restore.wait_stopped()
    copy = qemu.restored(run_dir)
    assert checks.ranges_with_userfault(copy.pid)
    refused = world.vmsnap("snapshot", "--qmp", copy.qmp_socket, "--output", world.path("no.img"),
                           "--restore-wait", "0.2").expect("refused")
    assert "userfaultfd" in refused.err
    second = world.path("vm.img")
    run = world.start_vmsnap("snapshot", "--qmp", copy.qmp_socket, "--output", second)
    restore.signal(signal.SIGCONT)
    run.wait().expect("ok")
    restore.wait().expect("ok")
    victims.assert_linux_goes_on(copy)
    again = world.path("run")
    world.vmsnap("restore", second, "--run-dir", again).expect("ok")
    victims.assert_linux_goes_on(qemu.restored(again))


@pytest.mark.parametrize("ram", ["two-backends", "file", "vga"])
def test_other_ram(world, ram):
    guest = victims.LinuxGuest(world, ram=ram, check_mib=4)
    image, _ = snapshot(world, guest)
    run_dir = world.path("run")
    world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
    victims.assert_linux_goes_on(qemu.restored(run_dir))
    victims.assert_linux_goes_on(guest)
