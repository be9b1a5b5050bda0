"""Others have monitors of their own, and stop, resume and change the VM while a
snapshot is taken: the image is one instant or there is none, and the VM is left
as they wanted it."""

import signal

import pytest

import checks
import harness
import qemu
import victims
from test_host_events import plug


@pytest.fixture
def operated(world):
    """A guest, and a second monitor."""
    guest = victims.OrderedGuest(world, second_monitor=True,
                                 extra=["-m", "128M,slots=4,maxmem=1G"])
    with qemu.Qmp(guest.second_socket) as monitor:
        yield guest, monitor


def snapshot_while(world, guest, point, act, *arguments):
    folder = world.directory("out")
    run = world.start_vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", folder / "vm.img",
                             *harness.PATIENT, *arguments, env={"VMSNAP_STOP_AT": point})
    run.wait_stopped()
    act()
    run.signal(signal.SIGCONT)
    return folder, run.wait()


def test_stopped_before_the_pause(world, operated):
    """It is not for us to resume what we did not stop."""
    guest, monitor = operated
    folder, result = snapshot_while(world, guest, "snapshot.output",
                                    lambda: monitor.execute("stop"))
    result.expect("ok")
    assert guest.status() == "paused"
    victims.check_ordered_image(world, folder / "vm.img")
    monitor.execute("cont")
    checks.assert_running(guest)


def test_resumed_before_the_pause(world, operated):
    """It was paused when it was looked at first."""
    guest, monitor = operated
    monitor.execute("stop")
    folder, result = snapshot_while(world, guest, "snapshot.output",
                                    lambda: monitor.execute("cont"))
    result.expect("ok")
    victims.check_ordered_image(world, folder / "vm.img")
    checks.assert_running(guest)


@pytest.mark.parametrize("point", ["pause.stopped", "pause.state_saved"])
def test_resumed_in_the_pause(world, operated, point):
    """The devices' state would be older than the memory."""
    guest, monitor = operated
    folder, result = snapshot_while(world, guest, point, lambda: monitor.execute("cont"))
    result.expect("vm")
    assert "resumed" in result.err
    checks.assert_only(folder)
    checks.assert_running(guest)


def test_plugged_in_before_the_instant(world, operated):
    """The image would not have it, and the devices' state would."""
    guest, monitor = operated
    folder, result = snapshot_while(world, guest, "snapshot.output", lambda: plug(monitor, 1))
    result.expect("vm")
    assert "plugged" in result.err
    checks.assert_only(folder)
    checks.assert_running(guest)
