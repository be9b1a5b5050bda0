"""A Linux guest that checks its own memory goes on after a snapshot, and so does
each VM that is restored from it; and the image is the guest's RAM, byte by byte."""

import json

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
    guest = victims.LinuxGuest(world, mib=256, unprivileged=unprivileged)
    files = checks.open_files(guest.pid)
    image, figures = snapshot(world, guest)
    checks.assert_unharmed(guest.pid, files)
    victims.assert_linux_goes_on(guest)
    for name in ("id", "file", "pause_ms", "total_ms", "attach_ms", "pages", "bytes",
                 "write_faults", "fault_us"):
        assert name in figures, f"{name} is not in {figures}"

    # Two of them beside the original: one waits for all pages, one does not.
    first = world.path("run")
    world.vmsnap("restore", image, "--run-dir", first).expect("ok")
    second = world.path("run")
    world.vmsnap("restore", image, "--run-dir", second, "--detach").expect("ok")
    copies = [qemu.restored(first), qemu.restored(second)]
    for copy in copies:
        victims.assert_linux_goes_on(copy)
    victims.assert_linux_goes_on(guest)
    harness.wait_until(lambda: not world.vmsnap_processes(), "the page servers to end")
    for copy in copies:
        checks.assert_running(copy)
        victims.assert_linux_goes_on(copy, more_checks=3)
    json.loads((first / "restore.json").read_text())
    assert len({guest.pid, *(copy.pid for copy in copies)}) == 3


def test_snapshot_of_a_restored_guest(world):
    """A restored VM is a VM like any other: it can be captured and restored."""
    guest = victims.LinuxGuest(world, mib=192)
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


def assert_equals_memory(world, machine, image):
    """Every mapped region of the image is, byte by byte, what a paused guest has."""
    raw = harness.export(world, image)
    compared = set()
    with open(raw, "rb") as exported:
        for region in harness.regions(world, image):
            length, address = int(region["length"]), victims.region_address(region)
            left, offset = length, 0
            if address is None:
                exported.seek(length, 1)
                continue
            host = machine.host_address(address)
            while left:
                part = min(left, 16 << 20)
                ours = exported.read(part)
                theirs = qemu.read_memory(machine.pid, host + offset, part)
                if ours != theirs:
                    page = next(at for at in range(0, part, 4096)
                                if ours[at:at + 4096] != theirs[at:at + 4096])
                    raise AssertionError(f"{region['name']}: differs at byte {offset + page:#x}")
                left -= part
                offset += part
            compared.add(region["name"])
    raw.unlink()
    return compared


@pytest.mark.parametrize("ram", list(qemu.RAM_KINDS))
def test_image_is_the_ram(world, ram):
    """A paused guest, captured and compared; it is still paused afterwards."""
    guest = victims.LinuxGuest(world, ram=ram)
    guest.qmp("stop")
    image, _ = snapshot(world, guest)
    assert guest.status() == "paused", "the VM must stay as it was"
    names = assert_equals_memory(world, guest, image)
    expected = {"two-backends": {"ram0", "ram1"}, "vga": {"pc.ram", "vga.vram"},
                "anon": {"pc.ram"}, "above-4g": {"pc.ram"}}.get(ram, {"ram0"})
    assert expected <= {name.split("/")[-1] for name in names}, f"compared only {names}"
    guest.qmp("cont")
    victims.assert_linux_goes_on(guest)

    # It is restored paused, too, and has the same memory there.
    run_dir = world.path("run")
    world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
    copy = qemu.restored(run_dir)
    assert copy.status() == "paused"
    assert_equals_memory(world, copy, image)
    copy.qmp("cont")
    victims.assert_linux_goes_on(copy)
