"""The image of a paused VM is its RAM, byte by byte, for each kind of RAM; and so
is the memory of the VM that is restored from it, before it runs."""

import pytest

import checks
import harness
import qemu
import victims

CHUNK = 2 << 20


def populated(pid, address, length):
    """Whether a process has any page in a range of private memory."""
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        pagemap.seek(address // 4096 * 8)
        entries = memoryview(pagemap.read(length // 4096 * 8)).cast("Q")
    return any(entry >> 62 for entry in entries)  # present or swapped


def assert_equals(exported, machine, host, length, name, sparse):
    for offset in range(0, length, CHUNK):
        part = min(CHUNK, length - offset)
        ours = exported.read(part)
        if sparse and not populated(machine.pid, host + offset, part):
            theirs = bytes(part)  # reading it would populate gigabytes
        else:
            theirs = qemu.read_memory(machine.pid, host + offset, part)
        if ours != theirs:
            page = next(at for at in range(0, part, 4096)
                        if ours[at:at + 4096] != theirs[at:at + 4096])
            raise AssertionError(f"{name} differs in the page at {offset + page:#x}")


def assert_is_memory_of(world, machine, image, sparse):
    """Compares each mapped region of the image; returns their names."""
    raw = harness.export(world, image)
    compared = set()
    with open(raw, "rb") as exported:
        for region in harness.regions(world, image):
            length, address = int(region["length"]), victims.region_address(region)
            if address is None:
                exported.seek(length, 1)
                continue
            assert_equals(exported, machine, machine.host_address(address), length,
                          region["name"], sparse)
            compared.add(region["name"].split("/")[-1])
    raw.unlink()
    return compared


@pytest.mark.parametrize("ram", list(qemu.RAM_KINDS))
def test_image_is_the_ram(world, ram):
    guest = victims.OrderedGuest(world, ram=ram)
    guest.qmp("stop")
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    assert guest.status() == "paused", "the VM must stay as it was"
    sparse = ram == "above-4g"
    names = assert_is_memory_of(world, guest, image, sparse)
    expected = {"two-backends": {"ram0", "ram1"}, "vga": {"pc.ram", "vga.vram"},
                "anon": {"pc.ram"}, "above-4g": {"pc.ram"}}.get(ram, {"ram0"})
    assert expected <= names, f"only {names} were in the image"
    guest.qmp("cont")
    checks.assert_running(guest)

    # It is restored paused, too, and has the same memory there.
    run_dir = world.path("run")
    world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
    copy = qemu.restored(run_dir)
    assert copy.status() == "paused"
    assert_is_memory_of(world, copy, image, sparse)
    copy.qmp("cont")
    checks.assert_running(copy)
    victims.check_ordered_live(world, copy)
