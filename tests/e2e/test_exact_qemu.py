"""The image of a QEMU guest is one instant, while it writes at full speed."""

import pytest

import checks
import harness
import qemu
import victims


@pytest.mark.parametrize("number", range(20))
def test_twenty_snapshots(shared_world, guest, number):
    """At most one edge in each, and the counter always grows."""
    del number
    files = checks.open_files(guest.pid)
    folder = shared_world.directory("out")
    image = folder / "vm.img"
    figures = shared_world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image,
                                  "--json").expect("ok").json
    checks.assert_only(folder, "vm.img")
    checks.assert_running(guest, files)
    harness.verify(shared_world, image)
    edges, counter = victims.check_ordered_image(shared_world, image)
    assert edges <= 1
    assert counter > getattr(guest, "last_counter", 0), "not later than the image before"
    guest.last_counter = counter
    guest.write_faults = getattr(guest, "write_faults", 0) + figures["write_faults"]
    image.unlink()


def test_live_memory_is_unharmed(shared_world, guest):
    """After all those snapshots, through which it wrote, the guest's own memory is
    still in order."""
    assert getattr(guest, "write_faults", 1) > 0
    victims.check_ordered_live(shared_world, guest)
    checks.assert_running(guest)


@pytest.mark.parametrize("ram", [kind for kind in qemu.RAM_KINDS if kind != "anon"])
def test_each_kind_of_ram(world, ram):
    guest = victims.OrderedGuest(world, ram=ram)
    files = checks.open_files(guest.pid)
    image = world.path("vm.img")
    for _ in range(2):  # the second one finds huge pages split, and files cached
        world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image,
                     "--force").expect("ok")
        checks.assert_running(guest, files)
        victims.check_ordered_image(world, image)
    victims.check_ordered_live(world, guest)


def test_unprivileged_and_sandboxed(world):
    """QEMU as nobody, without capabilities, behind all of its seccomp filters."""
    guest = victims.OrderedGuest(world, unprivileged=True)
    files = checks.open_files(guest.pid)
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    checks.assert_running(guest, files)
    victims.check_ordered_image(world, image)


@pytest.mark.parametrize("ram", ["anon", "two-backends"])
def test_restored_guest_counts_on(world, ram):
    """The restored guest continues from the instant of the image; the original,
    beside it, never notices."""
    guest = victims.OrderedGuest(world, ram=ram)
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    _, at_the_instant = victims.check_ordered_image(world, image)
    run_dir = world.path("run")
    world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
    copy = qemu.restored(run_dir)
    checks.assert_running(copy)
    _, later = victims.check_ordered_live(world, copy)
    assert later >= at_the_instant, "the restored guest's counter went backwards"
    checks.assert_running(guest)
    victims.check_ordered_live(world, guest)
    assert not world.vmsnap_processes(), "the page server ends when all pages are there"
